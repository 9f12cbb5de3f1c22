"""The operations of a decoding step between its matrix products on a GPU, each in one kernel or two.

    rotate_and_store    rotary embedding of queries and keys; keys and values go straight into the cache
    attend              one query a row against that row's own length, no mask and no padding
    rms_norm            of hidden states, queries and keys
    swiglu              silu(gate) * up

Attention is split over the cached tokens as in Flash-Decoding: with 64 rows and two key-value heads there would be
fewer programs than multiprocessors. The queries that share a key-value head are the rows of one small matrix product,
so that keys and values are read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 64
"""Cached tokens that a program takes at a time."""

PROGRAMS = 528
"""Number of programs to aim at, four for each of an H100's 132 multiprocessors."""

MAX_SPLITS = 16
"""Most parts that a row is split into; a power of two."""


def rotate_and_store(
    mixed: torch.Tensor, lengths: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    """Rotate one token of each row, and write its key and value behind what the row has in the cache.

    Args:
        mixed: [R, heads, queries per key + 2, s]: for each key-value head its queries, its key, its value; contiguous.
        lengths: int64 [R], tokens that the rows have; the new one goes to position ``lengths``.
        cos, sin: float32 [length, s], any stride between positions; the first half of ``sin`` is negated.
        cache: one layer's [rows, length, heads, 2, s] with rows >= R, contiguous; written in place.

    Returns:
        [R, heads, queries per key, s], the rotated queries.
    """
    rows, heads, width, size = mixed.shape
    queries = mixed.new_empty(rows, heads, width - 2, size)
    _rotate_and_store[(rows, heads)](
        mixed,
        lengths,
        cos,
        sin,
        cos.stride(0),
        sin.stride(0),
        cache,
        cache.stride(0),
        cache.stride(1),
        queries,
        QUERIES=width - 2,
        WIDTH=triton.next_power_of_2(width),
        SIZE=size,
    )
    return queries


def attend(queries: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k^T * scale) v of one query token a row over its first ``lengths + 1`` cached tokens.

    Args:
        queries: [R, heads, queries per key, s], contiguous; s is a power of two, 16 or more.
        cache: one layer's [rows, length, heads, 2, s] with rows >= R, contiguous.
        lengths: int64 [R].
        scale: factor on the attention scores.

    Returns:
        [R, heads * queries per key * s] in the queries' dtype. Scores and sums are float32; probabilities are rounded
        to the values' dtype for the product with them.
    """
    rows, heads, group, size = queries.shape
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * heads))
    blocks = triton.cdiv(cache.shape[1], BLOCK_TOKENS)
    splits = min(wanted, MAX_SPLITS, triton.next_power_of_2(blocks))
    parts = torch.empty(rows, heads, splits, group, size, dtype=torch.float32, device=queries.device)
    statistics = torch.empty(rows, heads, splits, 2, group, dtype=torch.float32, device=queries.device)
    out = torch.empty_like(queries)
    _attend_split[(rows, heads, splits)](
        queries,
        cache,
        cache.stride(0),
        cache.stride(1),
        lengths,
        scale * 1.4426950408889634,  # the kernel's exponentials are powers of two
        parts,
        statistics,
        GROUP=group,
        PADDED=max(16, triton.next_power_of_2(group)),
        SIZE=size,
        BLOCK=BLOCK_TOKENS,
        SPLITS=splits,
        num_warps=4,
        num_stages=3,
    )
    _merge_splits[(rows * heads, group)](parts, statistics, out, GROUP=group, SIZE=size, SPLITS=splits, num_warps=1)
    return out.view(rows, heads * group * size)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension [..., h], contiguous, in float32 and rounded once.

    One program for each row: with the few rows of a decoding step torch's kernel takes three times as long.
    """
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if rows := x.numel() // width:
        size = triton.next_power_of_2(width)
        warps = max(1, min(8, size // 256))
        _rms_norm[(rows,)](x, weight, out, width, epsilon, SIZE=size, num_warps=warps)
    return out


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 f], contiguous -> silu(gate) * up [T, f], in float32 and rounded once."""
    tokens, width = gate_and_up.shape
    out = gate_and_up.new_empty(tokens, width // 2)
    if tokens:
        _swiglu[(tokens, triton.cdiv(width // 2, 1024))](gate_and_up, out, width // 2, BLOCK=1024)
    return out


@triton.jit
def _rotate_and_store(
    mixed_ptr,
    lengths_ptr,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    cache_ptr,
    row_stride,
    token_stride,
    queries_ptr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Program (row, head)."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    position = tl.load(lengths_ptr + row)
    part, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, SIZE)[None, :]
    source = mixed_ptr + (row * heads + head) * (QUERIES + 2) * SIZE + part * SIZE
    real = part < QUERIES + 2
    x = tl.load(source + column, mask=real, other=0.0)
    rolled = tl.load(source + (column + SIZE // 2) % SIZE, mask=real, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * cos_stride + column)
    sin = tl.load(sin_ptr + position * sin_stride + column)
    turned = (x.to(tl.float32) * cos + rolled * sin).to(x.dtype)
    queries = queries_ptr + (row * heads + head) * QUERIES * SIZE + part * SIZE + column
    tl.store(queries, turned, mask=part < QUERIES)
    cached = cache_ptr + row * row_stride + position * token_stride + head * 2 * SIZE
    stored = tl.where(part > QUERIES, x, turned)  # the value stays as it is
    tl.store(cached + (part - QUERIES) * SIZE + column, stored, mask=real & (part >= QUERIES))


@triton.jit
def _attend_split(
    queries_ptr,
    cache_ptr,
    row_stride,
    token_stride,
    lengths_ptr,
    scale,
    parts_ptr,
    statistics_ptr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row, head, split): maximum, sum and unnormalised result of the split's part of the row."""
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    pair = row * tl.num_programs(1) + head
    length = tl.load(lengths_ptr + row).to(tl.int32) + 1
    split_tokens = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, length)

    member, column = tl.arange(0, PADDED), tl.arange(0, SIZE)
    token = tl.arange(0, BLOCK)
    real = member[:, None] < GROUP
    query = tl.load(queries_ptr + pair * GROUP * SIZE + member[:, None] * SIZE + column[None, :], mask=real, other=0.0)
    keys = cache_ptr + row * row_stride + head * 2 * SIZE

    # The maximum of no tokens is a finite number, so that splits beyond a short row's end merge with weight 0.
    maximum = tl.full((PADDED,), -1.0e30, tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    result = tl.zeros((PADDED, SIZE), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + token
        within = at < last
        offset = at[:, None].to(tl.int64) * token_stride + column[None, :]
        key = tl.load(keys + offset, mask=within[:, None], other=0.0)
        value = tl.load(keys + SIZE + offset, mask=within[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(within[None, :], score, float("-inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        p = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        maximum = larger
    part = (pair * SPLITS + split) * GROUP
    tl.store(parts_ptr + (part + member[:, None]) * SIZE + column[None, :], result, mask=real)
    tl.store(statistics_ptr + part * 2 + member, maximum, mask=member < GROUP)
    tl.store(statistics_ptr + part * 2 + GROUP + member, total, mask=member < GROUP)


@triton.jit
def _merge_splits(parts_ptr, statistics_ptr, out_ptr, GROUP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Program (row and head, query of the group)."""
    pair, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    part = (pair * SPLITS + split) * GROUP
    maxima = tl.load(statistics_ptr + part * 2 + member)
    totals = tl.load(statistics_ptr + part * 2 + GROUP + member)
    scales = tl.exp2(maxima - tl.max(maxima, 0))
    results = tl.load(parts_ptr + (part[:, None] + member) * SIZE + column[None, :])
    result = tl.sum(results * scales[:, None], 0) / tl.sum(totals * scales, 0)
    tl.store(out_ptr + (pair * GROUP + member) * SIZE + column, result.to(out_ptr.dtype.element_ty))


@triton.jit
def _swiglu(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Program (token, block of columns)."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + token * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, width, epsilon, SIZE: tl.constexpr):
    """Program (row)."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    tl.store(out_ptr + row * width + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)
