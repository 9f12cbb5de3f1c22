"""The Triton kernels against the torch code that runs on a CPU.

Without a GPU, ``TRITON_INTERPRET=1`` runs them on a CPU where triton is installed (a minute; no bfloat16 products).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemo_aapo.engines.megatron import sampling
from nemo_aapo.types import SamplingSpec
from tests.engines.megatron.test_sampling import ROUNDED_UP

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or triton and TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies bfloat16 as integers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SAMPLING_CASES = [
    # rows, vocabulary, padding, dtype, temperature, stop tokens
    (3, 5001, 119, torch.float32, 1.0, ()),
    (40, 150, 10, torch.bfloat16, 0.7, (3, 7, 149)),
    (1, 2049, 0, torch.float32, 1.3, (2048,)),
]
if not INTERPRETED:
    SAMPLING_CASES += [
        (rows, 151_936, 128, dtype, 1.0, (151_643,)) for rows in (1, 64, 256) for dtype in (torch.float32, HALF)
    ]


@pytest.mark.parametrize(("rows", "vocab_size", "padding", "dtype", "temperature", "stops"), SAMPLING_CASES)
def test_the_fused_race_draws_the_same_tokens(rows, vocab_size, padding, dtype, temperature, stops):
    from nemo_aapo.engines.megatron.kernels import sampling_triton

    logits = (torch.randn(rows, vocab_size + padding, device=DEVICE) * 3).to(dtype)
    logits[:, vocab_size:] = 60.0  # would win, were it not padding
    logits[:, list(stops)] += 9.0
    seeds = torch.randint(0, 2**63 - 1, (rows,), device=DEVICE)
    steps = torch.randint(0, 6, (rows,), device=DEVICE)
    spec = SamplingSpec(temperature=temperature, max_new_tokens=8, stop_token_ids=stops, min_new_tokens=3)
    tokens, logprobs = sampling_triton.sample(
        logits,
        1 / temperature,
        seeds,
        steps,
        vocab_size,
        sampling.early_stops(spec, vocab_size, logits.device),
        spec.min_new_tokens,
    )
    expected, _ = sampling._sample_block(logits[:, :vocab_size], seeds, steps, spec)
    assert (tokens != expected).sum() <= rows // 64  # ties within rounding errors: none in most runs
    z = logits[:, :vocab_size].double() / temperature
    z[:, list(stops)] = z[:, list(stops)].masked_fill((steps < 3)[:, None], -torch.inf)
    exact = torch.log_softmax(z, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("seed", "index"), ROUNDED_UP)
def test_the_only_possible_token_wins_the_fused_race_whatever_its_noise(seed, index):
    from nemo_aapo.engines.megatron.kernels import sampling_triton

    logits = torch.zeros(1, 64, device=DEVICE)
    logits[0, index] = 200.0
    seeds, steps = torch.tensor([seed], device=DEVICE), torch.tensor([0], device=DEVICE)
    tokens, logprobs = sampling_triton.sample(logits, 1.0, seeds, steps, 64, None, 0)
    assert tokens.tolist() == [index]
    assert logprobs.tolist() == [0.0]


@pytest.mark.parametrize(("shape", "dtype"), [((5, 96), torch.float32), ((3, 2, 4, 64), HALF), ((64, 1536), HALF)])
def test_rms_norm_is_torchs(shape, dtype):
    from nemo_aapo.engines.megatron.kernels import decode_triton

    x, weight = torch.randn(*shape, device=DEVICE).to(dtype), torch.randn(shape[-1], device=DEVICE).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        decode_triton.rms_norm(x, weight, 1e-6).double(), expected, rtol=tolerance, atol=tolerance
    )


def test_the_fused_race_shows_logits_that_are_not_finite():
    from nemo_aapo.engines.megatron.kernels import sampling_triton

    logits = torch.zeros(3, 3000, device=DEVICE)
    logits[0, 2999], logits[1, 5] = torch.nan, torch.inf
    rows = torch.arange(3, device=DEVICE)
    tokens, logprobs = sampling_triton.sample(logits, 1.0, rows, rows, 3000, None, 0)
    assert logprobs.isfinite().tolist() == [False, False, True]
    assert ((tokens >= 0) & (tokens < 3000)).all()


ATTENTION_CASES = [
    # rows, rows of the cache, heads, queries per key, head size, length of the cache, dtype
    (5, 7, 2, 3, 16, 100, torch.float32),
    (3, 3, 2, 6, 128, 300, torch.float32),
    (4, 4, 2, 7, 64, 200, HALF),
    (1, 1, 1, 1, 32, 40, torch.float32),
]
if not INTERPRETED:
    ATTENTION_CASES += [
        (rows, 256, heads, group, size, 1000, HALF)
        for rows in (1, 64, 256)
        for heads, group, size in ((2, 7, 64), (2, 6, 128), (8, 4, 128))
    ]


@pytest.mark.parametrize(("rows", "capacity", "heads", "group", "size", "length", "dtype"), ATTENTION_CASES)
def test_attention_over_rows_of_different_lengths(rows, capacity, heads, group, size, length, dtype):
    from nemo_aapo.engines.megatron.kv_cache import KVCache

    angles = torch.outer(torch.arange(length).float(), 10_000 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
    ours, theirs = (
        KVCache(
            layers=2,
            rows=capacity,
            length=length,
            heads=heads,
            queries_per_key=group,
            angles=angles.to(DEVICE),
            scale=size**-0.5,
            dtype=dtype,
        )
        for _ in range(2)
    )
    theirs.kv.normal_()
    ours.kv.copy_(theirs.kv)
    lengths = np.random.default_rng(0).integers(0, length, rows)
    lengths[0] = 0
    mixed = torch.randn(rows, heads, group + 2, size, device=DEVICE).to(dtype)
    theirs.begin(np.zeros(rows, dtype=np.int64), lengths, [], [])
    expected = theirs.attend(1, mixed)
    out = ours.attend_rows(1, mixed, torch.from_numpy(lengths).to(DEVICE))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.kv, theirs.kv, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tokens", "width"), [(7, 1500), (1, 4864), (64, 8960)])
def test_swiglu(tokens, width):
    from nemo_aapo.engines.megatron.kernels.decode_triton import swiglu

    units = torch.randn(tokens, 2 * width, device=DEVICE).to(HALF)
    gate, up = units.double().chunk(2, -1)
    torch.testing.assert_close(swiglu(units).double(), F.silu(gate) * up, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("tokens", "columns", "first"), [(5, 3001, 0), (3, 40, 16), (1, 2048, 128)])
def test_a_tiles_statistics_and_gradient(tokens, columns, first):
    from nemo_aapo.learner import logprobs as logprob
    from nemo_aapo.learner import logprobs_triton as logprob_triton

    hidden = torch.zeros(tokens, 1, device=DEVICE)
    statistics, expected = logprob._no_statistics(hidden), logprob._no_statistics(hidden)
    targets = torch.randint(0, 2 * columns, (tokens,), device=DEVICE)  # some lie in the tile
    targets[0] = first + columns - 1
    for shift in (0.0, 30.0, -30.0):  # the maximum grows, and stays
        tile = torch.randn(tokens, columns, device=DEVICE) * 3 + shift
        logprob_triton.add_statistics(tile, targets, first, statistics)
        part = logprob._statistics(tile.clone(), targets - first, torch.empty_like(tile))
        expected = logprob._merge(torch.stack([expected, part]))
        expected[3] = torch.where(part[3].isneginf(), expected[3], part[3])  # each tile stands at the same columns here
    torch.testing.assert_close(statistics, expected, rtol=2e-5, atol=1e-5)

    logsumexp = tile.logsumexp(1) + 0.5
    grad = torch.randn(tokens, device=DEVICE)
    wanted = logprob._grad_logits(tile.clone(), targets - first, logsumexp, grad)
    half = logprob_triton.grad_logits(tile, targets, first, logsumexp, grad, torch.empty_like(tile, dtype=HALF))
    torch.testing.assert_close(half.float(), wanted, rtol=1e-2, atol=1e-6)
    in_place = logprob_triton.grad_logits(tile, targets, first, logsumexp, grad, tile)
    torch.testing.assert_close(in_place, wanted, rtol=1e-5, atol=1e-6)
