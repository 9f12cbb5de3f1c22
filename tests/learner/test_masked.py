"""The share of masked tokens in the learner: what is not finite counts, and too many end the run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.errors import ParityError
from nemo_aapo.learner.learner import Learner
from nemo_aapo.learner.microbatch import PrefixGroup, collate
from nemo_aapo.types import Sample
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
