"""A checkpoint of a mixture of experts goes on with its experts on any number of ranks, and on the same to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checkpoint_runs import make_checkpointer, make_policy, same, train, train_and_save, weights

LAYOUTS = {  # ranks, TP, PP, EP
    "EP 2": (2, 1, 1, 2),
    "one rank": (1, 1, 1, 1),
    "TP 2, EP 2": (2, 2, 1, 2),
    "PP 2, EP 2": (4, 1, 2, 2),
}


@pytest.fixture(scope="module")
def saved(ranks, tiny_models, tmp_path_factory):
    """Checkpoints by EP 2 with the distributed optimizer; the weights at the newest, and one step later."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    model = tiny_models["qwen3_moe"]
    return directory, *ranks.run(train_and_save, model, directory, 1, 1, True, 2, world=2, ep=2)[0]


def _resume_and_train(model, directory, tp, pp, ep):
    policy = make_policy(model, tp, pp, True, ep)
    make_checkpointer(directory).resume(policy)
    resumed = weights(policy)
    train(policy, 4)
    return resumed, weights(policy)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_it_goes_on_with_its_experts_on_any_number_of_ranks(ranks, tiny_models, saved, layout):
    directory, now, later = saved
    world, tp, pp, ep = LAYOUTS[layout]
    model = tiny_models["qwen3_moe"]
    for resumed, trained in ranks.run(
        _resume_and_train, model, directory, tp, pp, ep, world=world, tp=tp, pp=pp, ep=ep
    ):
        assert same(resumed, now)
        for name in later:
            np.testing.assert_allclose(trained[name], later[name], rtol=0, atol=0 if layout == "EP 2" else 1e-6)
