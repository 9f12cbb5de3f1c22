"""Whole runs whose sequences are cut over ranks: the run of one rank, from one layout to the other and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemo_aapo.checkpoint import manifest
from tests.training_runs import exported, make_input, metrics, run, settings

WORDS = (
    "trainer.val_check_interval=1",
    "checkpoint.save_interval=1",
    "model.optim.use_distributed_optimizer=true",
)
CUT = "model.context_parallel_size=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model and ten prompts."""
    return make_input(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def go_on(ranks, folder):
    """``go_on(run_dir, world, steps)``: a run up to a step, on one rank or with sequences cut over two."""

    def go(run_dir: Path, world: int, steps: int) -> Path:
        more = [*WORDS, f"trainer.max_steps={steps}", *([CUT] if world > 1 else [])]
        words = settings(folder, run_dir, *more, world=world)
        assert ranks.run(run, words, world=world, tp=None) == [0] * world
        return run_dir

    return go


@pytest.fixture(scope="module")
def alone(folder, go_on):
    return go_on(folder / "alone", 1, 4)


@pytest.fixture(scope="module")
def cut(folder, go_on):
    return go_on(folder / "cut", 2, 4)


@pytest.fixture(scope="module")
def cut_to_2(folder, go_on):
    """The first two steps of it."""
    return go_on(folder / "cut_to_2", 2, 2)


def assert_same_run(run_dir: Path, other: Path) -> None:
    """What was drawn and judged is the same, what was computed differs by rounding."""
    drawn = ("reward", "completion_length", "groups", "advantage", "truncated_fraction", "validation", "microbatches")
    for line, expected in zip(metrics(run_dir), metrics(other), strict=True):
        assert line.keys() == expected.keys()
        for key in expected:
            if key.startswith(drawn):
                assert line[key] == pytest.approx(expected[key], rel=1e-9, nan_ok=True), key
        for key in {"loss", "entropy", "negative_advantage_logprob", "parity/mult_prob_error"} & expected.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
        if "grad_norm" in expected:
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    weights, expected = (load_file(d / "hf_model" / "model.safetensors") for d in (run_dir, other))
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-5, err_msg=name)


def test_a_run_with_cut_sequences_is_the_run_of_one_rank(alone, cut):
    assert_same_run(cut, alone)
    rows, expected = (
        [json.loads(line) for line in (d / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
        for d in (cut, alone)
    )
    assert sorted(rows, key=str) == sorted(expected, key=str)  # each copy of the model draws its own half
    layout = manifest.read(cut / "checkpoints" / "step_000004").layout
    assert layout["context_parallel_size"] == 2
    assert layout["data_parallel_size"] == 1


def test_it_goes_on_to_the_same_bits(go_on, cut, cut_to_2, tmp_path):
    run_dir = go_on(shutil.copytree(cut_to_2, tmp_path / "run"), 2, 4)
    assert metrics(run_dir) == metrics(cut)
    assert exported(run_dir) == exported(cut)


def test_one_rank_takes_it_over_and_gives_it_back(go_on, alone, cut_to_2, tmp_path):
    run_dir = go_on(go_on(shutil.copytree(cut_to_2, tmp_path / "run"), 1, 3), 2, 4)
    assert_same_run(run_dir, alone)
