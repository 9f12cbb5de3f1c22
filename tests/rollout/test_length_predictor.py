"""Prompts whose completions were long come first; the memory is bounded and survives a checkpoint."""

from __future__ import annotations

import json

import numpy as np

from nemo_aapo.rollout import length_predictor as order_module
from nemo_aapo.rollout.length_predictor import LengthPredictor
from nemo_aapo.types import Prompt


def prompt(name: str, length: int = 4) -> Prompt:
    return Prompt(name, np.zeros(length, np.int32), "", "", "")


def test_longest_expected_first_unseen_ones_as_average_then_by_prompt_length():
    memory = LengthPredictor()
    prompts = [prompt("a", 3), prompt("b", 9), prompt("c", 5)]
    assert memory.longest_first(prompts) == [1, 2, 0]  # nothing known but the prompts
    memory.observe([("a", 100.0), ("b", 10.0), ("d", 70.0)])  # 60 on average
    assert memory.longest_first(prompts) == [0, 2, 1]


def test_what_is_expected_follows_the_lengths():
    memory = LengthPredictor()
    memory.observe([("a", 100.0), ("b", 60.0)])
    for _ in range(3):
        memory.observe([("a", 20.0)])
    assert memory.longest_first([prompt("a"), prompt("b")]) == [1, 0]
    assert 20 < memory.state_dict()["a"] < 60


def test_the_prompts_seen_last_are_kept(monkeypatch):
    monkeypatch.setattr(order_module, "PROMPTS_KEPT", 3)
    memory = LengthPredictor()
    for name in "abcad":
        memory.observe([(name, 7.0)])
    assert list(memory.state_dict()) == ["c", "a", "d"]


def test_a_checkpoint_keeps_all_that_the_order_depends_on(monkeypatch):
    monkeypatch.setattr(order_module, "PROMPTS_KEPT", 20)
    generator = np.random.default_rng(0)
    memory, resumed = LengthPredictor(), LengthPredictor()
    prompts = [prompt(str(i)) for i in range(40)]
    for step in range(30):
        if step == 15:
            resumed.load_state_dict(json.loads(json.dumps(memory.state_dict())))
        lengths = [(str(i), generator.random() * 99) for i in generator.choice(40, 6, replace=False)]
        for one in (memory, resumed):
            one.observe(lengths)
    assert resumed.longest_first(prompts) == memory.longest_first(prompts)
    assert list(resumed.state_dict()) == list(memory.state_dict())
