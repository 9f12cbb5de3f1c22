"""The quickstart's task and base model: no overlap, the stated noise, whole or not there."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from examples.quickstart import arithmetic, base_model
from examples.quickstart.base_model import BaseModelError, Recipe, make_base_model

QUICK = Recipe(clean_steps=2, noisy_steps=2, batch_size=8)


def test_the_three_parts_share_no_sum_and_leave_none_out():
    sums = arithmetic.split_sums(seed=3)
    parts = [set(sums.supervised), set(sums.training), set(sums.validation)]
    assert [len(part) for part in parts[1:]] == [arithmetic.TRAINING_PROMPTS, arithmetic.VALIDATION_PROMPTS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(arithmetic.OPERANDS) ** 2


def test_noisy_answers_come_in_the_stated_shares():
    generator = random.Random(0)
    pairs = arithmetic.split_sums(seed=0).supervised
    kinds = collections.Counter()
    for pair in generator.choices(pairs, k=100_000):
        text = arithmetic.noisy_answer(pair, generator)
        kinds["true" if text == arithmetic.answer(pair) else "slip" if text == arithmetic.slip(pair) else "other"] += 1
        assert text.isdigit()
        assert not text.startswith("0")
    assert kinds["true"] / 100_000 == pytest.approx(arithmetic.TRUE_SHARE, abs=0.005)
    assert kinds["slip"] / 100_000 == pytest.approx(arithmetic.SLIP_SHARE, abs=0.005)


def test_the_tokenizer_gives_back_what_it_was_given():
    tokenizer = arithmetic.make_tokenizer()
    for text in ("37+48=", "What is 5 * 6?", "".join(map(chr, range(32, 127)))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>1+2=<assistant>3<eos>"


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_same_seed_makes_the_same_model_and_a_second_call_finds_it(tmp_path):
    said = []
    make_base_model(tmp_path / "a", QUICK, force=False, log=said.append)
    make_base_model(tmp_path / "b", QUICK, force=False, log=said.append)
    make_base_model(tmp_path / "c", replace(QUICK, seed=1), force=False, log=said.append)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    before = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    said.clear()
    make_base_model(tmp_path / "a", QUICK, force=False, log=said.append)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == before
    assert "there already" in said[0]
    with pytest.raises(BaseModelError, match="--force"):
        make_base_model(tmp_path / "a", replace(QUICK, seed=1), force=False, log=said.append)


@pytest.mark.slow
def test_an_interrupted_build_is_not_taken_for_a_model(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base_model, "accuracy", stop)  # everything but the stamp is written by then
        with pytest.raises(KeyboardInterrupt):
            make_base_model(tmp_path / "model", QUICK, force=False, log=print)
    assert not (tmp_path / "model").exists()
    made = make_base_model(tmp_path / "model", QUICK, force=False, log=print)
    assert json.loads((tmp_path / "model" / base_model.STAMP).read_text()) == made
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_force_replaces_a_base_model_and_removes_nothing_else(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(BaseModelError, match="no base model"):
            make_base_model(theirs, QUICK, force=force, log=print)
    assert (theirs / "notes.txt").read_text() == "years of work"
    make_base_model(tmp_path / "ours", QUICK, force=False, log=print)
    made = make_base_model(tmp_path / "ours", replace(QUICK, seed=1), force=True, log=print)
    assert made["recipe"]["seed"] == 1


@pytest.mark.slow
def test_the_right_answers_go_on_until_it_can_add(tmp_path):
    said = []
    recipe = replace(QUICK, clean_steps=50, clean_loss=100.0, noisy_steps=0)
    make_base_model(tmp_path / "easy", recipe, force=False, log=said.append)
    assert [line for line in said if "step" in line] == said[:1]
    assert said[0].startswith("base model: step 1 on right answers")
    said.clear()
    make_base_model(tmp_path / "hard", replace(recipe, clean_loss=0.0), force=False, log=said.append)
    assert said[0].startswith("base model: step 50 on right answers")


def test_plain_transformers_samples_from_the_whole_vocabulary(tmp_path):
    from transformers import AutoModelForCausalLM

    make_base_model(tmp_path / "model", QUICK, force=False, log=print)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.top_k == 0


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "nemo_aapo" not in sys.modules
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
rows = [json.loads(line) for line in open(sys.argv[2])]
chats = [[{"role": "user", "content": row["question"]}] for row in rows]
prompts = torch.tensor(tokenizer.apply_chat_template(chats, add_generation_prompt=True))
out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
texts = tokenizer.batch_decode(out[:, prompts.shape[1]:], skip_special_tokens=True)
print(sum(text.strip() == row["answer"] for text, row in zip(texts, rows)) / len(rows))
"""


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_quickstart_doubles_the_accuracy_and_plain_transformers_reproduces_it(tmp_path):
    root = Path(__file__).parents[2]
    here = {"cwd": root, "env": {**os.environ, "PYTHONPATH": str(root)}, "check": True}
    base, run = tmp_path / "base", tmp_path / "run"
    subprocess.run([sys.executable, "scripts/make_base_model.py", "--out", str(base)], **here)
    settings = [f"model.path={base}", f"data.train={base}/data/train.jsonl", f"run.dir={run}"]
    settings += [f"data.validation={base}/data/validation.jsonl", "trainer.max_steps=40"]
    command = [sys.executable, "scripts/train.py", "experiment=quickstart", *settings]
    printed = subprocess.run(command, **here, capture_output=True, text=True, timeout=600).stdout
    assert "accuracy, sampled" in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "validation/accuracy_sampled" in line]
    assert 0.15 < first["validation/accuracy_sampled"] < 0.35
    assert last["validation/accuracy_sampled"] > max(0.6, 2 * first["validation/accuracy_sampled"])
    # -I: neither this checkout nor PYTHONPATH; cwd elsewhere
    plain = [sys.executable, "-I", "-c", PLAIN, str(run / "hf_model"), str(base / "data" / "validation.jsonl")]
    greedy = float(subprocess.run(plain, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    assert greedy == pytest.approx(last["validation/accuracy_greedy"], abs=1.5 / 256)
