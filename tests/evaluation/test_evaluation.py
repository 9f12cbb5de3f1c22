"""The evaluation's page, its refusals, what is kept of it, its tables, and comparisons of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_aapo.config.command_line import EVALUATION, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.facts import settings_of
from nemo_aapo.errors import ConfigError, RecordsError
from nemo_aapo.evaluation import compare, report
from nemo_aapo.evaluation.records import Record, Records, claim_identity
from tests.scripts import exit_code_and_heavy_imports, load_script
from tests.tiny_models import save_empty_model

IDENTITY = {"model": "a", "seed": 1, "sampling": {"temperature": 0.6}}


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


@pytest.fixture
def model(tmp_path) -> Path:
    directory = save_empty_model(tmp_path / "model", max_position_embeddings=40960)
    (directory / "tokenizer_config.json").write_text("{}")  # by its name a tokenizer, which is not loaded
    return directory


def record(problem: str, sample: int, correct: bool, **more) -> Record:
    fields = {"failed": False, "voted": str(int(correct)), "tokens": 5, "finish_reason": "stop", "level": None}
    texts = {"subject": None, "gold": "1", "prompt": "q", "completion": "1", "source": "f:1"}
    return Record(problem=problem, sample=sample, correct=correct, **{**fields, **texts, **more})


def keep(directory: Path, benchmark: str, rows: list[Record], identity: dict | None = None) -> Path:
    claim_identity(directory, identity or IDENTITY)
    Records(directory, benchmark).append(rows)
    return directory


# ---------------------------------------------------------------- page and script


def test_what_decides_an_evaluation_is_what_its_record_compares(tmp_path):
    from nemo_aapo.jobs.evaluate import _identity

    tree = compose(read_command_line([f"model.path={tmp_path}"], EVALUATION))
    config = EVALUATION.parse(tree)
    compared = set(_identity(config, config, "weights"))
    parts = {setting.key.split(".")[0] for setting in settings_of(EVALUATION.schema) if setting.facts.decides}
    assert parts == {"rewards" if name == "reward" else name for name in compared}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modle.path=x"], "did you mean 'model.path'"),
        (["sampling.temprature=1"], "did you mean 'sampling.temperature'"),
        (["algorithm=gpg"], "unknown setting 'algorithm'"),
        (["sources.mine=f"], "+sources.NAME=VALUE"),
        (["benchmarks=[mine]"], "'mine' has no source"),
        (["benchmarks=[gsm8k,gsm8k]"], "each only once"),
        (["prompt_template=openrs"], "known are open_rs"),
        (["samples=0"], "samples=0: must be at least 1"),
        (["samples=4", "sampling.temperature=0"], "all of a problem would be the same"),
        (["sampling.top_p=0"], "must be in (0, 1]"),
        (["sampling.max_new_tokens=40000"], "max_new_tokens=40000 = 42048 exceeds the 40960 positions"),
        (["max_concurrent_tokens=100"], "can't hold one sequence"),
        (["rewards=[]"], "one that says right or wrong"),
        (["rewards=[{name: acuracy}]"], "did you mean 'accuracy'"),
        (["model.tensor_model_parallel_size=4"], "does not divide the model's 2 key-value groups"),
        (["trainer.devices=3", "model.tensor_model_parallel_size=2"], "3 ranks can't be cut"),
        (["model.base=elsewhere"], "model.base has no effect"),
        (["model.path=nowhere"], "nowhere"),
        (["precision.name=fp7"], "precision.name='fp7'"),
        (["precision=fp8_tensorwise"], "known values are auto, fp32, bf16"),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(script, model, capsys, monkeypatch, words, said):
    monkeypatch.delenv("RANK", raising=False)
    assert script.main([f"model.path={model}", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


@pytest.mark.slow
def test_a_refusal_comes_before_torch_is_imported(model):
    assert exit_code_and_heavy_imports("evaluate", [f"model.path={model}", "max_concurrent_tokens=1"]) == "2 []"


def test_help_names_the_commands_and_the_settings(script, capsys):
    assert script.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("compare A B", "model.path=", "samples=1", "sampling.max_new_tokens=32768"))
    assert "algorithm" not in told


def test_several_devices_are_started_as_ranks_of_the_same_command(script, model, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("nemo_aapo.launch.local.run_ranks", lambda *what, **limits: started.append(what) or 7)
    monkeypatch.delenv("RANK", raising=False)
    words = [f"model.path={model}", f"run.dir={tmp_path / 'out'}", "trainer.devices=2"]
    assert script.main(words) == 7
    assert [(command[1:], count) for command, count, _ in started] == [(["-m", "nemo_aapo.cli", "evaluate", *words], 2)]


# ---------------------------------------------------------------- what is kept


def test_records_come_back_as_they_were_and_half_a_line_is_forgotten(tmp_path):
    records = Records(tmp_path, "math500")
    rows = [record("p", 0, True, completion='é "\n\u2028'), record("p", 1, False, voted=None)]
    records.append(rows)
    assert list(records.read().values()) == rows
    with records.path.open("a", encoding="utf-8") as file:
        file.write('{"problem": "p", "prompt": "é')
    cut = records.path.read_bytes()[:-1]  # within the last character
    records.path.write_bytes(cut)
    records.mend(records.read().values())
    records.append([record("q", 0, True)])
    assert list(records.read()) == [("p", 0), ("p", 1), ("q", 0)]
    with records.path.open("a", encoding="utf-8") as file:
        file.write('{"problem": "p"}\n')
    with pytest.raises(RecordsError, match=r"math500.jsonl:4: damaged"):
        records.read()


def test_a_directory_belongs_to_one_evaluation(tmp_path):
    claim_identity(tmp_path, IDENTITY)
    claim_identity(tmp_path, dict(IDENTITY))
    with pytest.raises(ConfigError, match=r'model: "a" there, "b" now'):
        claim_identity(tmp_path, {**IDENTITY, "model": "b"})
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        claim_identity(tmp_path, IDENTITY)


# ---------------------------------------------------------------- tables


def test_tables_have_a_line_for_each_benchmark_their_mean_and_levels_of_their_own():
    rows = [record(f"p{i}", k, (i + k) % 3 == 0, level=str(i % 2)) for i in range(6) for k in range(2)]
    found = report.judged({(row.problem, row.sample): row for row in rows})
    one = replace(found, records=tuple(row[:1] for row in found.records))
    results = {"math500": report.figures(found), "amc23": report.figures(one)}
    text = report.tables(results)
    lines = text.splitlines()
    assert lines[2].startswith("| math500   |        6 |   2 | ")
    assert [cell.strip() for cell in lines[3].split("|")[5:8]] == ["", "", ""]  # one sample has one figure
    assert lines[4].startswith("| **mean**")
    assert "| level | problems |" in text
    assert "| 0     |        3 |" in text
    mean = report.macro_average(results)
    assert mean.value == pytest.approx((results["math500"]["avg@2"]["value"] + results["amc23"]["avg@1"]["value"]) / 2)
    assert "by_subject" not in results["math500"]


def test_what_could_not_be_judged_is_said_beside_the_figures_and_is_in_none_of_them(tmp_path):
    fails = {("p0", 0), ("p1", 0), ("p1", 1)}
    rows = [record(f"p{i}", k, i == 0 and k == 1, failed=(f"p{i}", k) in fails) for i in range(3) for k in range(2)]
    figures = report.figures(report.judged({(row.problem, row.sample): row for row in rows}))
    assert (figures["avg@2"]["value"], figures["pass@2"]["value"]) == (0.5, 0.0)  # of p0 and p2; of p2
    assert (figures["failed_fraction"], figures["unjudged_problems"]) == (0.5, 1)
    line = report.tables({"gsm8k": figures}).splitlines()
    assert line[0].split("|")[-2].strip() == "not judged"
    assert line[2].split("|")[-2].strip() == "50.0%"
    a = keep(tmp_path / "a", "gsm8k", rows)
    b = keep(tmp_path / "b", "gsm8k", [record(f"p{i}", 0, True) for i in range(3)], {**IDENTITY, "model": "b"})
    ((found,), _) = compare.compare(a, b)
    assert (found.difference.problems, found.left_out, found.a, found.b) == (2, 1, 0.5, 1.0)


def test_two_evaluations_are_compared_on_the_problems_that_both_have(script, tmp_path, capsys):
    a = keep(tmp_path / "a", "gsm8k", [record(f"p{i}", k, i < 4) for i in range(10) for k in range(2)])
    b = keep(tmp_path / "b", "gsm8k", [record(f"p{i}", 0, i < 9) for i in range(2, 12)], {**IDENTITY, "model": "b"})
    ((line,), notes) = compare.compare(a, b)
    assert (line.samples, line.difference.problems, line.left_out, notes) == ((2, 1), 8, 4, [])
    assert (line.a, line.b, line.difference.value) == (2 / 8, 7 / 8, 5 / 8)
    assert line.difference.p_value == pytest.approx(2 / 2**5)
    assert compare.compare(a, b) == compare.compare(a, b)
    assert script.main(["compare", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert "| gsm8k     |        8 | 2 / 1 | 25.0 | 87.5 | +62.5 ±" in told
    assert "problems that only one of them has: gsm8k 4" in told


def test_a_comparison_says_what_else_differs_and_refuses_where_there_is_nothing_to_compare(script, tmp_path, capsys):
    rows = [record(f"p{i}", 0, True) for i in range(3)]
    a, b = keep(tmp_path / "a", "gsm8k", rows), keep(tmp_path / "b", "amc23", rows, {**IDENTITY, "sampling": "other"})
    assert script.main(["compare", str(a), str(b)]) == 2
    assert "do not both have completions" in capsys.readouterr().err
    for directory in (a, b):
        Records(directory, "math500").append(rows[:0])
    assert script.main(["compare", str(a), str(b)]) == 2
    assert "has no whole completion yet" in capsys.readouterr().err
    for directory in (a, b):
        Records(directory, "math500").append(rows)
    assert script.main(["compare", str(a), str(b)]) == 0
    assert "not the same in both: sampling" in capsys.readouterr().out
    assert script.main(["compare", str(a), str(tmp_path)]) == 2
    assert "no evaluation is there" in capsys.readouterr().err
    Records(b, "gsm8k").append([replace(row, problem=row.problem + "x") for row in rows])
    with pytest.raises(ConfigError, match="no problem in common"):
        compare.compare(a, b, ["gsm8k"])
