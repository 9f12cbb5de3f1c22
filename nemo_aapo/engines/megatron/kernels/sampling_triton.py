"""``sampling.sample`` on a GPU in two kernels: logits are read once, and no tensor of noise or probabilities exists.

Each program takes one part of a row's vocabulary block by block and keeps five numbers: the softmax's running
maximum and sum, the leading racer's ``exp(z - maximum) / E``, and who that is. A second kernel merges the parts. The
random bits are those of ``sampling.exponential_noise``, so the tokens are the same but for ties within rounding errors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Vocabulary entries that a program takes at a time. An even number, as one hash serves two entries."""

PROGRAMS = 1056
"""Number of programs to aim at, eight for each of an H100's 132 multiprocessors; small batches split the vocabulary
more."""

LEAST = tl.constexpr(-3.4028234663852886e38)
"""The maximum of no entries at all: the least finite float32, as differences of maxima that are -inf would be NaN."""


def sample(
    logits: torch.Tensor,
    inverse_temperature: float,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    vocab_size: int,
    early_stops: torch.Tensor | None,
    min_new_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row by the exponential race over the whole softmax. See ``sampling.sample``.

    Args:
        logits: [B, padded vocabulary], float32, bfloat16 or float16; neighbours in a row are neighbours in memory.
        inverse_temperature: the logits are multiplied by it.
        seeds: int64 [B]. steps: int64 [B].
        vocab_size: the true vocabulary.
        early_stops: bool [V], tokens that are impossible in rows with ``steps < min_new_tokens``; None: there are none.
        min_new_tokens: has no effect without ``early_stops``.

    Returns:
        tokens int64 [B] and log-probs float32 [B].
    """
    rows, device = len(logits), logits.device
    blocks = triton.cdiv(vocab_size, BLOCK)
    split_blocks = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // max(rows, 1))))
    splits = triton.cdiv(blocks, split_blocks)
    numbers = torch.empty(3, rows, splits, dtype=torch.float32, device=device)
    leaders = torch.empty(rows, splits, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens, logprobs
    seeds, steps = seeds.contiguous(), steps.contiguous()
    _race[(rows, splits)](
        logits,
        logits.stride(0),
        seeds,
        steps,
        seeds if early_stops is None else early_stops.view(torch.uint8),
        min_new_tokens,
        inverse_temperature,
        numbers,
        leaders,
        vocab_size,
        split_blocks,
        HAS_STOPS=early_stops is not None,
        BLOCK=BLOCK,
    )
    _finish[(rows,)](
        logits,
        logits.stride(0),
        inverse_temperature,
        numbers,
        leaders,
        tokens,
        logprobs,
        splits,
        SPLITS=triton.next_power_of_2(splits),
    )
    return tokens, logprobs


@triton.jit
def _mix64(x):
    """``sampling.mix64_`` on uint64."""
    x = x ^ (x >> 30)
    x = x * 0xBF58476D1CE4E5B9
    x = x ^ (x >> 27)
    x = x * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _exponential(bits):
    """31 random bits -> Exp(1), ``-log(1 - u)`` of u = (bits + 1/2) / 2**31 < 1, to a few units in the last place.

    The hardware's logarithm has a small *absolute* error, which near u = 0, where the winners are, would be a large
    relative one. There the series of ``2 artanh(u / (2 - u))`` takes its place.
    """
    u = tl.minimum(bits.to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10, 0.99999994039535522)
    s = u / (2.0 - u)
    square = s * s
    series = 1.0 + square * (0.33333333333 + square * (0.2 + square * (0.14285714286 + square * 0.11111111111)))
    return tl.where(u < 0.25, 2.0 * s * series, -tl.log(1.0 - u))


@triton.jit
def _race(
    logits_ptr,
    row_stride,
    seeds_ptr,
    steps_ptr,
    stops_ptr,
    min_new_tokens,
    inverse_temperature,
    numbers_ptr,
    leaders_ptr,
    vocab_size,
    split_blocks,
    HAS_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, split): maximum, sum, best ratio and leader of the split's ``split_blocks`` blocks."""
    row, split = tl.program_id(0), tl.program_id(1)
    rows, splits = tl.num_programs(0), tl.num_programs(1)
    step = tl.load(steps_ptr + row)
    seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
    key = _mix64(_mix64(seed + 0x9E3779B97F4A7C15) + step.to(tl.uint64, bitcast=True))
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    maximum = tl.full((), LEAST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0.0, tl.float32)
    leader = tl.full((), 0, tl.int32)
    for index in range(split_blocks):
        start = (split * split_blocks + index) * BLOCK
        entries = start + tl.arange(0, BLOCK)
        inside = entries < vocab_size
        z = tl.load(row_ptr + entries, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        if HAS_STOPS:
            stops = tl.load(stops_ptr + entries, mask=inside & (step < min_new_tokens), other=0)
            z = tl.where(stops != 0, float("-inf"), z)

        pairs = (start // 2 + 1 + tl.arange(0, BLOCK // 2)).to(tl.uint64)
        hashed = _mix64(key + pairs * 0x9E3779B97F4A7C15)
        low, high = (hashed & 0x7FFFFFFF).to(tl.int32), ((hashed >> 32) & 0x7FFFFFFF).to(tl.int32)

        top = tl.maximum(tl.max(z, 0), LEAST)
        exp = tl.exp(z - top)
        ratio = exp / _exponential(tl.interleave(low, high))
        winning, winner = tl.max(ratio, 0, return_indices=True)

        larger = tl.maximum(maximum, top)
        scale, scale_new = tl.exp(maximum - larger), tl.exp(top - larger)
        total = total * scale + tl.sum(exp, 0) * scale_new
        best, winning = best * scale, winning * scale_new
        leader = tl.where(winning > best, start + winner, leader)
        best = tl.maximum(best, winning)
        maximum = larger
    at = row * splits + split
    tl.store(numbers_ptr + at, maximum)
    tl.store(numbers_ptr + rows * splits + at, total)
    tl.store(numbers_ptr + 2 * rows * splits + at, best)
    tl.store(leaders_ptr + at, tl.minimum(leader, vocab_size - 1))  # argmax over NaN may point anywhere


@triton.jit
def _finish(
    logits_ptr,
    row_stride,
    inverse_temperature,
    numbers_ptr,
    leaders_ptr,
    tokens_ptr,
    logprobs_ptr,
    splits,
    SPLITS: tl.constexpr,
):
    """Program (row): the winner over all splits, and its log-prob. A NaN among the logits makes the log-prob NaN."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    split = tl.arange(0, SPLITS)
    at, inside = row * splits + split, split < splits
    maxima = tl.load(numbers_ptr + at, mask=inside, other=LEAST)
    totals = tl.load(numbers_ptr + rows * splits + at, mask=inside, other=0.0)
    bests = tl.load(numbers_ptr + 2 * rows * splits + at, mask=inside, other=-1.0)
    maximum = tl.max(maxima, 0)
    scales = tl.exp(maxima - maximum)
    total = tl.sum(totals * scales, 0)
    winner = tl.argmax(bests * scales, 0)
    token = tl.load(leaders_ptr + row * splits + winner)
    z = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token).to(tl.float32) * inverse_temperature
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, z - maximum - tl.log(total))
