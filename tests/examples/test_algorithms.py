"""The examples of algorithms keep an algorithm's promises, and compute what their words say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.algorithms.gspo import GSPO
from examples.algorithms.margin_schedule import FadingMargin
from examples.algorithms.own_everything import BestOfGroup
from nemo_aapo.algorithms import ScoredGroups, Tokens
from nemo_aapo.algorithms.check import check
from nemo_aapo.algorithms.objective import Objective
from tests.algorithms.test_algorithms import preset

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("algorithm", [FadingMargin(), GSPO(), BestOfGroup()], ids=lambda a: type(a).__name__)
def test_an_example_keeps_an_algorithms_promises_and_is_short(algorithm):
    assert not [finding.wrong for finding in check(algorithm, preset("gpg")) if finding.wrong]
    text = (ROOT / Path(*type(algorithm).__module__.split("."))).with_suffix(".py").read_text()
    assert len(text.partition('"""\n\n')[2].splitlines()) <= 40


def test_the_margin_is_the_papers_at_first_and_fades():
    rewards, reference = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    groups = [ScoredGroups(rewards, reference, step=step, max_steps=11) for step in range(11)]
    made = [Objective.of(preset("aapo"), 8, FadingMargin()).advantages(part)[1, 0] for part in groups]
    assert made[0] == 0.28
    assert made[5] == pytest.approx(0.28 * 0.55)
    assert made[10] == pytest.approx(0.028)
    assert made == sorted(made, reverse=True)


def test_gspo_of_the_example_is_the_built_in_one_to_the_bit():
    config, generator = preset("gspo"), torch.Generator().manual_seed(0)
    old = -torch.rand(9, generator=generator)
    results = []
    for algorithm in (None, GSPO()):
        logprobs = (old + 1e-3 * torch.randn(9, generator=torch.Generator().manual_seed(1))).requires_grad_()
        advantages = torch.tensor([1.0, 1, 1, 1, -1, -1, 1, 1, 1])
        tokens = Tokens(logprobs, advantages, torch.ones(9) / 9, old, old_logprobs=old, lengths=[4, 2, 3])
        Objective.of(config, 8, algorithm).token_loss(tokens)[0].backward()
        results.append(logprobs.grad)
    assert torch.equal(*results)
    assert results[0].any()
    assert not dataclasses.asdict(GSPO())["low"] > 1


@pytest.mark.slow
def test_reward_data_and_algorithm_of_ones_own_train_together(tmp_path):
    from examples.quickstart.base_model import Recipe, make_base_model

    base = tmp_path / "results" / "quickstart_base"
    make_base_model(base, Recipe(clean_steps=10, noisy_steps=0), force=False, log=print)
    command = [sys.executable, "-W", "ignore", "-m", "examples.algorithms.own_everything"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "results" / "own"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    card = (run / "config.yaml").read_text()
    assert "name: BestOfGroup" in card
    assert "push: 0.2" in card
