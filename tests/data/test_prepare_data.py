"""scripts/prepare_data.py: what it writes a run takes as it is, and its report says what was left out and why."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.config.sources import Source
from nemo_aapo.data.prepare import prepare, preset_source
from nemo_aapo.data.prompts import load_prompts
from nemo_aapo.data.tokenizer import load_tokenizer
from nemo_aapo.errors import DataError
from tests.tiny_models import save_character_tokenizer

ROOT = Path(__file__).parents[2]


def script(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "scripts/prepare_data.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_a_worked_data_set_becomes_the_projects_jsonl_with_a_report(tmp_path):
    rows = [{"problem": f"What is {n}+1?", "solution": f"So \\boxed{{{n + 1}}}."} for n in range(10)]
    rows += [rows[0], {"problem": "What  is 1 + 1", "solution": "\\boxed{3}"}]  # a repeat; another answer to a question
    rows += [{"problem": "No box?", "solution": "7"}, {"problem": "Odd?", "solution": "\\boxed{\\frac{1}{}"}]
    rows += [{"problem": "x" * 300, "solution": "\\boxed{1}"}, {"solution": "\\boxed{1}"}]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "what is 3+1", "answer": "4"}) + "\n")
    save_character_tokenizer(tmp_path / "tokenizer")
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    words = ["--preset", "math", "--tokenizer", tmp_path / "tokenizer", "--max-prompt-tokens", 50]
    words += ["--against", tmp_path / "test.jsonl", "--drop-contaminated", "--report", report]
    done = script(tmp_path / "math.jsonl", "-o", out, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert (found["rows"], found["written"]) == (17, 10)
    assert found["dropped"] == {
        "no answer": 2,
        "no prompt": 1,
        "not JSON": 1,
        "repeat of an earlier row": 1,
        "longer than 50 tokens": 1,
        "among the held-out questions": 1,
    }
    assert found["rows"] == found["written"] + sum(found["dropped"].values())
    assert found["lengths"] == {"50%": 12, "90%": 14, "99%": 14, "longest": 14}
    assert found["conflicts"] == [[f"{tmp_path}/math.jsonl:2", f"{tmp_path}/math.jsonl:12"]]
    assert found["contamination"] == {f"{tmp_path}/test.jsonl": [f"{tmp_path}/math.jsonl:4"]}
    assert "17 rows, 10 written" in done.stdout
    assert "no answer: the worked solution has no \\boxed{}" in done.stdout
    loaded = load_prompts(out, load_tokenizer(str(tmp_path / "tokenizer")), max_prompt_tokens=50)
    assert [prompt.answer for prompt in loaded.prompts] == ["1", "2", "3", *map(str, range(5, 11)), "3"]


@pytest.mark.slow
def test_chat_messages_survive_and_a_gold_answer_that_no_reward_can_use_is_counted(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}]
    rows = [{"prompt": chat, "reward_model": {"ground_truth": answer}} for answer in ("7", "seven")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["--prompt-field", "prompt", "--answer-field", "reward_model.ground_truth", "--reward", "integer"]
    done = script(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *fields)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"question": chat, "answer": "7"}
    assert "dropped, gold answer that can't be verified: 1" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no.jsonl", "-o", "x"], 2, "no.jsonl: no such file"),
        (["a.jsonl", "-o", "x", "--preset", "nix"], 2, "there is no preset nix; there is dapo_math"),
        (["a.jsonl", "-o", "x", "--reward", "acuracy"], 2, "did you mean 'accuracy'"),
        (["-o", "x"], 2, "name a source, or --preset"),
        (["a.jsonl", "-o", "."], 2, "--output .: is a directory; name a file"),
        (["a.jsonl", "-o", ""], 2, "argument -o/--output: the path is empty"),
        (["", "-o", "x"], 2, "argument source: the path is empty"),
        (["reasoning_gym:chain_sum", "-o", "/proc/x.jsonl"], 2, "--output /proc/x.jsonl: nothing can be written in"),
        (["a.jsonl", "-o", "x", "--report", "/proc/x"], 2, "--report /proc/x: nothing can be written in /proc ("),
        (["a.jsonl", "-o", "x", "--report", "./x"], 2, "--report x: is --output, too"),
        (["a.jsonl", "-o", "x", "--max-prompt-tokens", "9"], 2, "--max-prompt-tokens needs --tokenizer"),
        (["reasoning_gym:chain_sum", "-o", "x"], 2, "has no end: say how many items (--size)"),
        (["reasoning_gym:chain_sum", "-o", "x", "--size", "9", "--split", "test"], 2, "--split has an effect not with"),
        (["a.jsonl", "-o", "x", "--size", "9"], 2, "--size has an effect with reasoning_gym:TASK only"),
        (["reasoning_gym:chain_sum", "-o", "x", "--parameters", "3"], 2, "no JSON object"),
    ],
)
def test_what_cant_work_is_one_message_and_nothing_is_written(tmp_path, words, code, message):
    done = script(*words)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert not (ROOT / "x").exists()


def test_held_out_rows_that_cannot_be_compared_are_never_taken_for_no_overlap(tmp_path):
    train, other = tmp_path / "train.jsonl", tmp_path / "aime.jsonl"
    train.write_text(json.dumps({"question": "What is 3+1?", "answer": "4"}) + "\n")
    other.write_text(json.dumps({"Aufgabe": "What is 3+1?", "answer": "4"}) + "\n")
    with pytest.raises(DataError, match=r'aime.jsonl: row 1: .*"question" is missing.*no row of these held-out data'):
        prepare(Source(str(train)), held_out=[Source(str(other))])
    with other.open("a") as file:  # as MATH-500 and AIME have it; the answer does not matter
        file.write(json.dumps({"problem": "what is 3 + 1"}) + "\n")
    report = prepare(Source(str(train)), held_out=[Source(str(other))])[1]
    assert report.contamination == {str(other): [f"{train}:1"]}
    assert report.not_compared == {str(other): 1}
    assert "not compared, as they can't be read: 1 of its rows" in report.text()


def test_a_preset_keeps_its_subset_for_the_published_name_and_not_for_a_copy():
    page = ROOT / "conf" / "data" / "gsm8k.yaml"
    named = preset_source(page, "train", {"path": "openai/gsm8k"})
    assert (named.subset, named.split) == ("main", "train")
    copy = preset_source(page, "train", {"path": "copy.jsonl"})
    assert (copy.subset, copy.split, copy.answer_field) == (None, None, "answer")


def test_ctrl_c_is_one_message_and_no_traceback(tmp_path, monkeypatch, capsys):
    namespace = runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_aapo.data.prepare.prepare", interrupted)
    (tmp_path / "in.jsonl").touch()
    words = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--reward", "none"]
    assert namespace["main"](words) == 130
    assert capsys.readouterr().err == f"stopped: {tmp_path}/out.jsonl was not written\n"


def test_rows_are_written_in_the_order_of_the_source_the_first_of_each(tmp_path):
    rows = [{"question": str(n % 7), "answer": "1"} for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, report = prepare(Source(str(tmp_path / "in.jsonl")))
    assert [row.number for row in kept] == list(range(1, 8))
    assert report.dropped == {"repeat of an earlier row": 23}
