"""The parts of ``scripts/benchmark.py peers`` that need no TRL; tests/peers/test_benchmark.py runs the whole."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.peers import compare, report
from benchmarks.peers.checkpoint import EOS, FIRST_WORD, bias_end_of_sequence, make_input
from benchmarks.peers.compare import Agreement, Cell, Found, Memory
from benchmarks.peers.orders import Step, Worker
from benchmarks.peers.plan import COMPARISONS, LABELS, OURS, QUICK, REAL, SIZES, TRL, Pretrained, models, reward
from nemo_aapo.errors import ConfigError, RunError


def step(cpu: float, wall: float = 2.0) -> Step:
    phases = dict.fromkeys(report.PHASES, 0.25)
    return Step(wall, cpu, tokens=100, reference_tokens=0, longest_over_mean=4.0, loss=-0.00001, phases=phases)


def found(ours: tuple[float, ...] = (1.0, 2.0, 4.0), theirs: tuple[float, ...] = (4.0, 4.0, 5.0)) -> Found:
    made = Found("1.2.3", COMPARISONS, "large")
    for c in COMPARISONS:
        for name, seconds in ((c.ours, ours), (c.theirs, theirs)):
            made.cells.append(Cell("small", c.lengths, 1, c.arm, name, tuple(map(step, seconds))))
    made.memory = [Memory("large", "fixed", "ours", 6 << 20), Memory("large", "fixed", "trl", 8 << 20)]
    return made


def test_every_contestant_has_a_side_and_a_label():
    assert {*OURS, *TRL} == set(LABELS) == {name for c in COMPARISONS for name in (c.ours, c.theirs)}
    for c in (*COMPARISONS, *REAL.comparisons):
        assert c.ours in OURS
        assert c.theirs in TRL


def test_models_are_sizes_or_directories_and_a_directorys_completions_end_by_themselves(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    size, directory = models(["135M", str(tmp_path), "135M"])
    assert size is SIZES["135M"]
    assert directory == Pretrained(tmp_path)
    assert set(REAL.comparisons_of(size)) == {"fixed", "variable"}
    assert set(REAL.comparisons_of(directory)) == {"variable"}
    with pytest.raises(ConfigError, match=r"'135m' is neither a size .*135M.* nor a Hugging Face directory"):
        models(["135m"])


class FakeWorker:
    alive: ClassVar[list[str]] = []
    most = 0

    def __init__(self, name, *_):
        self.name = name
        self.alive.append(name)
        FakeWorker.most = max(FakeWorker.most, len(self.alive))

    def wait(self):
        return {"fill_cpu": 1.0}

    def ask(self, do):
        assert self.name in self.alive
        return {"peak_bytes": 2}

    def close(self):
        self.alive.remove(self.name)


def test_no_more_than_two_contestants_are_alive_and_a_shared_one_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "Worker", FakeWorker)
    with contextlib.closing(compare.Contestants(QUICK, tmp_path, {})) as contestants:
        for before, now in itertools.pairwise([None, *QUICK.comparisons]):
            kept = FakeWorker.alive[:]
            pair = contestants.only(now.ours, now.theirs)
            assert list(pair) == [now.ours, now.theirs]
            assert sorted(FakeWorker.alive) == sorted(pair)
            assert before is None or set(kept) & set(pair), "each comparison but the first has a contestant already"
    assert (FakeWorker.most, FakeWorker.alive) == (2, [])
    assert set(contestants.peaks) | {"trl_twice", "ours_fresh"} == {*OURS, *TRL}


@pytest.mark.parametrize("probability", [1 / 16, None])
def test_the_end_of_sequence_comes_up_as_often_as_asked_wherever_a_sample_stands(probability):
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(1)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).float()
    bias_end_of_sequence(model, probability)
    with torch.no_grad():
        found = model(torch.randint(FIRST_WORD, 200, (16, 40))).logits.softmax(-1)[..., EOS]
    if probability is None:
        assert found.max() < 1e-12
        return
    assert found.mean().item() == pytest.approx(probability, rel=0.05)
    assert 0.5 * probability < found.min()
    assert found.max() < 2 * probability


def test_a_checkpoints_words_are_its_token_ids(tmp_path):
    from transformers import AutoTokenizer

    model = QUICK.models[0]
    paths = make_input(model, QUICK, "variable", tmp_path)
    path = Path(paths["model"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("w7 w255")["input_ids"] == [7, 255]
    assert len(tokenizer) == model.vocabulary
    assert len(Path(paths["prompts"]).read_text().splitlines()) == QUICK.data_prompts


def test_rewards_are_a_coin_toss_of_the_tokens():
    assert [reward([1, 2]), reward([2, 2]), reward(torch.tensor([3, 5]))] == [0.0, 1.0, 1.0]


def test_ratios_are_of_medians_and_their_range_is_of_turns():
    first = report.ratios(found())[0]
    assert (first.cpu, first.low, first.high, first.wall) == (0.5, 0.25, 0.8, 1.0)
    assert [r.comparison for r in report.ratios(found())] == list(COMPARISONS)


def test_the_tables_say_which_targets_were_met_and_which_were_missed():
    text = report.tables(found(), (1.0, 2.0))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "0.85 met" in rows["a"]
    assert "0.45 missed" in rows["b"]
    assert "0.35 missed" in rows["c, stored"]
    assert re.search(r"large \|\s+6 \|\s+0.75 \|\s+0.70 missed", text)
    assert "-0.0000" not in text


def test_tables_of_what_was_measured_before_an_interruption_are_tables():
    part = Found("1.2.3", COMPARISONS, "large", memory=found().memory)
    assert "0.70 missed" in report.tables(part, (0.0, 0.0))


COUNT = """
import json, sys
from benchmarks.peers.picture import bars
(axes,) = bars(json.load(sys.stdin)).axes
heights = [bar.get_height() for container in axes.containers if hasattr(container, "patches") for bar in container]
lines = [float(line.get_segments()[0][0][1]) for line in axes.collections if line.get_linestyle()[0][1]]
print(json.dumps([heights, lines]))
"""


@pytest.mark.slow
def test_the_picture_has_a_bar_for_each_ratio_and_a_line_for_each_target():
    """In a process of its own: matplotlib lies beside TRL."""
    if not compare.PEERS.is_dir():
        pytest.skip("no .venv-peers: run bash scripts/peers.sh")
    ratios = report.ratios(found())
    drawn = subprocess.run(
        [sys.executable, "-c", COUNT],
        input=json.dumps([dataclasses.asdict(ratio) for ratio in ratios]),
        env=compare.environment(peers=True),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    heights, lines = json.loads(drawn.stdout)
    assert heights == [ratio.cpu for ratio in ratios]
    assert lines == [c.target for c in COMPARISONS if c.target is not None]


@pytest.mark.parametrize("wrong", ["logprobs", "loss", "gradient_norm"])
def test_sides_that_do_not_compute_the_same_are_not_compared(wrong):
    same = {"logprobs": 1e-7, "loss": 0.5, "trl_loss": 0.5, "gradient_norm": 2.0, "trl_gradient_norm": 2.0}
    Agreement("m", "fixed", **same).require()
    with pytest.raises(RunError, match="do not compute the same"):
        Agreement("m", "fixed", **{**same, wrong: same[wrong] + 0.01}).require()


def test_without_trl_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "PEERS", tmp_path)
    with pytest.raises(RunError, match=r"no trl \d.*bash scripts/peers.sh"):
        next(compare.measure(QUICK, tmp_path, print))


@pytest.mark.slow
def test_a_contestant_that_ends_is_named_with_the_end_of_its_output(tmp_path):
    worker = Worker("ours", "no_such_module_anywhere", {}, tmp_path, dict(os.environ))
    try:
        with pytest.raises(RunError, match=r"ours ended.*\n.*no_such_module_anywhere"):
            worker.ask("step")
    finally:
        worker.close()
