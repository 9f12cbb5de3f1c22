"""A mixture of experts draws the same tokens wherever its experts are, also where ranks have to decode in step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engines.megatron.generation import SEEDS, SPEC, TIGHT, VOCAB_SIZE, build, flat, prompts

pytestmark = pytest.mark.exact

LAYOUTS = {  # ranks; TP, PP, EP
    "TP2": (2, 2, 1, 1),
    "TP2 EP2": (2, 2, 1, 2),
    "DP2": (2, 1, 1, 1),
    "DP2 EP2": (2, 1, 1, 2),
    "PP2 DP2 EP2": (4, 1, 2, 2),
    "TP2 DP2 EP2": (4, 2, 1, 2),
    "TP2 DP2 EP4": (4, 2, 1, 4),
    "DP4 EP4": (4, 1, 1, 4),
}


def own_generated(path, tp, pp):
    """This data-parallel rank's completions of every so-manieth prompt, by prompt; and the engine's steps."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path, tp, pp, tp > 1), VOCAB_SIZE, TIGHT, record_routes=True)
    mine = range(parallel.data_parallel_rank(), len(SEEDS), parallel.data_parallel_size())
    out = engine.generate([prompts()[i] for i in mine], SPEC, [SEEDS[i] for i in mine])
    return dict(zip(mine, out, strict=True)), engine.stats.steps


@pytest.fixture(scope="module")
def on_one_rank(ranks, tiny_models):
    ((completions, _),) = ranks.run(own_generated, tiny_models["qwen3_moe"], 1, 1)
    return completions


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_of_experts_draws_the_same_tokens_by_the_same_experts(ranks, tiny_models, on_one_rank, layout):
    world, tp, pp, ep = LAYOUTS[layout]
    for own, _ in ranks.run(own_generated, tiny_models["qwen3_moe"], tp, pp, world=world, tp=tp, pp=pp, ep=ep):
        for i, row in own.items():
            assert flat([row]) == flat([on_one_rank[i]])
            for completion, expected in zip(row, on_one_rank[i], strict=True):
                np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-5)
                np.testing.assert_array_equal(completion.routes.prompt, expected.routes.prompt)
                np.testing.assert_array_equal(completion.routes.completion, expected.routes.completion)
