"""The plain engine and the megatron engine's decoder draw the same tokens: each is the other's oracle."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest

from tests.engines.megatron.generation import GREEDY, ROOMY, SEEDS, SNUG, SPEC, VOCAB_SIZE, build, flat, prompts
from tests.marks import exact_for

CASES = {  # model, TP, PP
    "one rank": ("qwen2", 1, 1),
    "TP2 with sequence parallelism": ("qwen3", 2, 1),
    "PP2": ("qwen2_tied", 1, 2),
    "experts": ("qwen3_moe", 1, 1),
}
SPECS = (SPEC, GREEDY, dataclasses.replace(SPEC, stop_strings=("ab", "q", "xyz"), top_p=0.9))


def text(token_ids: np.ndarray) -> str:
    return "".join(chr(ord("a") + token % 26) for token in token_ids)


def of_both(path, tp, pp):
    """What the engines generate with each spec, and in which order: the megatron engine's, the plain one's."""
    from nemo_aapo.engines.base import RolloutEngine
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.engines.plain import PlainEngine

    model = build(path, tp, pp, tp > 1)
    plain = PlainEngine(model, VOCAB_SIZE, SNUG, policy_version=4, decode=text, multiple=tp)
    assert isinstance(plain, RolloutEngine)
    engines = MegatronEngine(model, VOCAB_SIZE, ROOMY, policy_version=4, decode=text), plain
    return [[engine.generate(prompts(), spec, SEEDS) for engine in engines] for spec in SPECS]


@pytest.mark.parametrize("case", exact_for(CASES, "one rank", "PP2"))
def test_the_plain_forward_pass_and_the_decoder_draw_the_same_tokens(ranks, tiny_models, case):
    name, tp, pp = CASES[case]
    for results in ranks.run(of_both, tiny_models[name], tp, pp, world=tp * pp, tp=tp, pp=pp):
        for fast, plain in results:
            assert flat(plain) == flat(fast)
            for one, other in zip(chain(*plain), chain(*fast), strict=True):
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
                assert (one.finish_reason, one.policy_version) == (other.finish_reason, 4)
                assert (one.token_ids.dtype, one.logprobs.dtype) == (np.int32, np.float32)


def broken_off(path, pp):
    """Completions that came before the sampling rank (the last) had enough, and the call that comes after."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.plain import PlainEngine

    engine, told = PlainEngine(build(path, 1, pp), VOCAB_SIZE, ROOMY), []

    def enough(i, j, completion):
        told.append((i, j))
        return parallel.rank() == 1 and len(told) >= 3

    out = engine.generate(prompts(), SPEC, SEEDS, enough)
    return told, [len(row) for row in out], flat(engine.generate(prompts()[:1], SPEC, [[0]])), engine.stats


def test_a_call_ends_on_all_ranks_when_the_sampling_rank_has_enough(ranks, tiny_models):
    (told, lengths, after, stats), others = ranks.run(broken_off, tiny_models["qwen2"], 2, world=2, pp=2)
    assert (told, lengths, after) == others[:3]
    assert 3 <= len(told) < sum(map(len, SEEDS))
    assert after
    assert stats.tokens == len(after[0])
