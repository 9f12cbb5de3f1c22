"""Whatever a hook of one's own does ends in words: the hook, the line, the remedy; and what it is given stays whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nemo_aapo.algorithms import Algorithm, ScoredGroups, Tokens
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.errors import AlgorithmError, RunError
from tests.algorithms.test_algorithms import GPG

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Given(Algorithm):
    """Does what the test says."""

    does: Callable

    def advantages(self, groups):
        return self.does(groups)

    def token_loss(self, tokens):
        return self.does(tokens)


def plain(tokens: Tokens) -> torch.Tensor:
    return -(tokens.weights * tokens.advantages * tokens.logprobs).sum()


def fail(*_):
    raise KeyError("nope")


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (fail, r"Given\.advantages failed with KeyError: 'nope' \(.*test_hooks\.py:\d+: raise KeyError"),
        (lambda groups: groups.rewards[:, :1], r"Given\.advantages gave an array \(2, 1\) for rewards \(2, 3\)"),
        (lambda groups: None, "gave None: an array of numbers is needed"),
        (lambda groups: "x", "gave a str: an array of numbers is needed"),
        (lambda groups: groups.rewards + 1j, r"gave an array \(2, 3\) of complex128: an array of numbers"),
        (lambda groups: groups.rewards + np.nan, "gave 6 advantages that are not finite"),
        (lambda groups: np.add(groups.rewards, 1, out=groups.rewards), "read-only"),
    ],
    ids=["raises", "shape", "none", "text", "complex", "nan", "writes"],
)
def test_advantages_that_are_none_are_named(does, words):
    rewards = np.zeros((2, 3))
    with pytest.raises(AlgorithmError, match=words):
        Objective.of(GPG, 8, Given(does)).advantages(ScoredGroups(rewards))
    assert not rewards.any()


@pytest.mark.parametrize(
    "does",
    [lambda groups: groups.rewards.tolist(), lambda groups: torch.tensor(groups.rewards, dtype=torch.float32)],
    ids=["lists", "tensor"],
)
def test_advantages_of_any_kind_of_numbers_are_taken(does):
    made = Objective.of(GPG, 8, Given(does)).advantages(ScoredGroups(np.array([[1.0, 0.5]])))
    assert made.dtype == np.float64
    assert made.tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (fail, r"Given\.token_loss failed with KeyError: 'nope'"),
        (lambda t: None, "gave None: a loss and a mapping of metrics are needed"),
        (plain, r"gave a tensor \(\) of torch\.float32: a loss and a mapping"),
        (lambda t: (t.weights * t.logprobs, {}), r"gave a tensor \(4,\) of torch\.float32 as loss: a scalar"),
        (lambda t: (0.0, {}), "gave a float as loss"),
        (lambda t: (plain(t).half(), {}), r"torch\.float16 as loss"),
        (lambda t: (plain(t).detach(), {}), "without a gradient"),
        (lambda t: (plain(t), {"mine": 1.0}), "gave a float as metric 'mine'"),
        (lambda t: (plain(t), {"mine": t.logprobs}), r"gave a tensor \(4,\) of torch\.float32 as metric 'mine'"),
        (lambda t: (plain(t), {"mine": plain(t)}), "'mine' that carries a gradient"),
        (lambda t: (plain(t), {"loss": t.weights.sum()}), "metric 'loss': there is one of that name"),
        (lambda t: (plain(t), {"tokens": t.weights.sum()}), "metric 'tokens': there is one of that name"),
        (
            lambda t: (plain(t.replace(weights=t.weights.mul_(2))), {}),
            r"wrote into tokens\.weights, which is used again",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_loss_that_is_none_is_named(does, words):
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    tokens = Tokens(logprobs, torch.ones(4), torch.ones(4), torch.full((4,), -1.0))
    with pytest.raises(AlgorithmError, match=words):
        Objective.of(GPG, 8, Given(does)).token_loss(tokens)


def test_an_error_of_the_run_stays_what_it_is():
    def stop(_):
        raise RunError("look at the disk")

    with pytest.raises(RunError, match=r"^look at the disk$"):
        Objective.of(GPG, 8, Given(stop)).advantages(ScoredGroups(np.zeros((1, 2))))
