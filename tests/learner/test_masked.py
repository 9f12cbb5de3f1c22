"""The share of masked tokens in the learner: what is not finite counts, and too many end the run."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import ParityError
from nemo_aapo.learner.learner import Learner
from nemo_aapo.learner.microbatch import PrefixGroup, collate
from nemo_aapo.training.parity import ParityGate
from nemo_aapo.types import Completion, Group, Prompt, Sample
from tests.algorithms.test_algorithms import preset


def test_a_token_whose_engine_logprob_is_not_finite_has_no_weight_and_no_other_changes():
    ids, logprobs = np.arange(4, dtype=np.int32), np.array([-0.1, -np.inf, np.nan, -0.3], np.float32)
    samples = [Sample(ids[:2], ids, logprobs, 1.0), Sample(ids[:2], ids, np.full(4, -0.5, np.float32), -1.0)]
    batch = collate(PrefixGroup.separate(samples), [0.5, 0.25], multiple=1, device=torch.device("cpu"))
    assert batch.weights.tolist() == [0.5, 0.0, 0.0, 0.5, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(("limit", "stops"), [(0.5, True), (0.7, False), (None, False)])
def test_more_masked_tokens_than_allowed_end_the_run_in_words(limit, stops):
    config = dataclasses.replace(preset("aapo"), max_masked_fraction=limit)
    learner = Learner(SimpleNamespace(), Objective.of(config, 8), 64, 1)
    if stops:
        with pytest.raises(ParityError, match=r"60.0% of the tokens were masked, more than algorithm.max_masked_frac"):
            learner._check_masked(0.6)
    else:
        assert learner._check_masked(0.6) == 0.6


@pytest.fixture
def one_rank(monkeypatch):
    for name, value in (("context_parallel_size", 1), ("batch_parallel_size", 1), ("batch_parallel_rank", 0)):
        monkeypatch.setattr(parallel, name, lambda value=value: value)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(
        parallel, "exchange_data_parallel", lambda outgoing: [item for part in outgoing for item in part]
    )


def group(advantages, logprobs):
    completions = tuple(
        Completion(np.array([3, 4, 5, 1], np.int32), np.array(row, np.float32), "stop", 0) for row in logprobs
    )
    prompt, rewards = Prompt("a", np.array([5], np.int32), "", "", ""), np.array(advantages)
    return Group(prompt, completions, ("", ""), rewards, {"r": rewards}, np.zeros(2, bool), advantages=rewards)


NAN = math.nan
LIVE = group([0.5, -0.5], [[-1, NAN, NAN, -1], [-1, NAN, NAN, NAN]])
DEAD = [group([0.0, 0.0], [[-1, -1, -1, NAN]] * 2)] * 3


def test_the_masked_fraction_is_one_of_the_trained_tokens(one_rank):
    """Of 8, in a batch of 32: 5 without a log-prob, and a mask drops one of the other 3."""
    sums = {"loss": 0.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 3.0, "masked_fraction": 1.0}
    sums |= {"parity/abs_logprob_difference": 0.0, "parity/kl": 0.0}
    optimization = SimpleNamespace(train_step=lambda batches, loss: dict(sums), finish_updates=lambda: None)
    for limit in (None, 0.7):
        config = dataclasses.replace(preset("aapo"), max_masked_fraction=limit)
        learner = Learner(SimpleNamespace(optimization=optimization), Objective.of(config, 8), 64, 1)
        if limit is None:
            assert learner.update([LIVE, *DEAD])["masked_fraction"] == pytest.approx(6 / 8)
        else:
            with pytest.raises(ParityError, match=r"75\.0% of the tokens were masked"):
                learner.update([LIVE, *DEAD])


def test_log_probs_that_are_not_finite_are_no_agreement(one_rank):
    learner = Learner(SimpleNamespace(), Objective.of(preset("aapo"), 8), 64, 1)
    with pytest.raises(ParityError, match=r"62\.5% of the tokens that the engine sampled .* not finite"):
        learner.parity([LIVE])
    nothing = {"parity/mult_prob_error": NAN, "parity/gen_kl": NAN}
    limits = SimpleNamespace(max_parity_error=1.05, max_gen_kl=1e-3, on_parity_error="stop")
    gate = ParityGate(limits, SimpleNamespace(parity=lambda groups: nothing))
    with pytest.raises(ParityError, match="before the first step: engine and learner disagree"):
        gate.check([])
    assert gate.watch(1, {"rollout/lag": 0.0, **nothing}) is None  # a step of which no token was trained on
