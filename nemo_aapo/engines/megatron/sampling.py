"""Sampling tokens from logits with counter-based random streams.

A stream is named by its seed, and the random numbers of its t-th token are a hash of (seed, t, vocabulary index).
Nothing is carried from one token to the next, so a token depends on the sequence's own past, its seed and the weights,
whatever else is in the batch and wherever the sequence sits in it.

Tokens are sampled by an exponential race, ``argmax_k p_k / E_k`` with independent E_k ~ Exp(1), which is Gumbel-max
without its last logarithm. Inverting the CDF would need one uniform number instead of one a vocabulary entry, but
each boundary between two tokens then moves with the rounding errors of all logits before it. With errors of size e
the sampled token changes with a probability of about ``e`` in the race and ``e * sqrt(vocabulary) / 2`` with the CDF
(measured at 500 and 20,000 entries). Layouts (TP, PP, batch sizes) differ by such errors and should give the same
tokens.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from nemo_aapo.types import SamplingSpec

BLOCK_ENTRIES = 1 << 20
"""Rows are sampled in blocks of about so many logits. That bounds the noise's memory, and a block of a large vocabulary
stays within a CPU's caches (three times faster than 64 x 151,936 at once)."""

CUDA_BLOCK_ENTRIES = 1 << 26
"""Logits of a block on a GPU, which wants few large kernels: 441 rows of 151,936 logits, 256 MiB of noise."""

LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The largest float32 below 1."""

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed integer: splitmix64's step
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def mix64_(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood, 2014; Stafford's variant 13), in place, on int64 of any shape.

    Each bit of the result depends on each bit of the argument. int64 products wrap around as unsigned ones do; the
    masks make the arithmetic shifts logical.
    """
    x ^= (x >> 30).bitwise_and_((1 << 34) - 1)
    x *= _MIX_1
    x ^= (x >> 27).bitwise_and_((1 << 37) - 1)
    x *= _MIX_2
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def exponential_noise(seeds: torch.Tensor, steps: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Independent Exp(1) numbers, a pure function of (seed, step, vocabulary index).

    Args:
        seeds: int64 [B], the name of each row's stream.
        steps: int64 [B], index of the token that is to be sampled, counted from the first of the completion.
        vocab_size: V.

    Returns:
        float32 [B, V], each in (0, 17).
    """
    keys = mix64_(mix64_(seeds + _GOLDEN) + steps)
    pairs = torch.arange(1, (vocab_size + 1) // 2 + 1, device=seeds.device) * _GOLDEN
    # one hash serves two entries, 32 bits each
    bits = mix64_(keys[:, None] + pairs).view(torch.int32)[:, :vocab_size].bitwise_and(0x7FFFFFFF)
    # u = (bits + 1/2) / 2**31 is finest near 0, where the winner of a race is: -log(u) of a u that rounds up to 1 would
    # win against all. One that rounds up to 1 here would lose even where no other token is possible (E = inf).
    u = bits.to(torch.float32).mul_(2.0**-31).add_(2.0**-32).clamp_(max=LARGEST_UNIFORM)
    return u.neg_().log1p_().neg_()


def sample(
    logits: torch.Tensor, sampling: SamplingSpec, seeds: torch.Tensor, steps: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token for each row.

    Args:
        logits: [B, padded vocabulary], any float dtype; columns from ``vocab_size`` on are padding and ignored.
        sampling: temperature (0: the likeliest token), stop tokens, ``min_new_tokens``, ``top_p``.
        seeds: int64 [B], the name of each row's stream.
        steps: int64 [B], index of the token within its completion.
        vocab_size: the true vocabulary.

    Returns:
        tokens int64 [B], and their log-probs float32 [B]: ``log_softmax(logits / temperature)`` over the true
        vocabulary (temperature 1 when greedy). Before ``min_new_tokens`` stop tokens count as impossible there too.
        ``top_p`` narrows what is sampled, not what is reported.
    """
    if logits.is_cuda and not sampling.greedy and sampling.top_p >= 1.0:
        from nemo_aapo.engines.megatron.kernels import sampling_triton  # triton comes with torch's CUDA builds only

        stops = early_stops(sampling, vocab_size, logits.device)
        minimum = sampling.min_new_tokens
        return sampling_triton.sample(logits, 1 / sampling.temperature, seeds, steps, vocab_size, stops, minimum)
    size = max(1, (CUDA_BLOCK_ENTRIES if logits.is_cuda else BLOCK_ENTRIES) // vocab_size)
    blocks = zip(logits[:, :vocab_size].split(size), seeds.split(size), steps.split(size), strict=True)
    tokens, logprobs = zip(*(_sample_block(*block, sampling) for block in blocks), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def finite(sampled: np.ndarray, policy_version: int) -> tuple[np.ndarray, np.ndarray]:
    """Split float64 [2, B] into tokens int64 and log-probs.

    Raises:
        FloatingPointError: a log-prob is not finite.
    """
    tokens, logprobs = sampled
    if not np.isfinite(logprobs).all():
        raise FloatingPointError(
            f"policy version {policy_version} gives log-probs that are not finite: the weights or the "
            "activations have overflowed. Look at grad_norm and the learning rate of the steps before"
        )
    return tokens.astype(np.int64), logprobs


def _sample_block(
    logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, sampling: SamplingSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sample`` for a few rows, without padding columns."""
    logits = logits.float()
    if not sampling.greedy and sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    stops = early_stops(sampling, logits.shape[1], logits.device)
    if stops is not None:
        logits = logits.masked_fill(stops & (steps < sampling.min_new_tokens)[:, None], -torch.inf)
    probs = torch.softmax(logits, -1)
    if sampling.greedy:
        tokens = _argmax(logits)
    else:
        racers = probs if sampling.top_p >= 1.0 else _nucleus(probs, sampling.top_p)
        noise = exponential_noise(seeds, steps, logits.shape[1])
        tokens = _argmax(torch.div(racers, noise, out=noise))
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()


def _argmax(x: torch.Tensor) -> torch.Tensor:
    """``x.argmax(-1)``. On a CPU numpy's is ten times faster; both take the first of equals, and NaN as largest."""
    return x.argmax(-1) if x.is_cuda else torch.from_numpy(x.numpy().argmax(-1))


@lru_cache(maxsize=8)
def early_stops(sampling: SamplingSpec, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """bool [V], the tokens that are impossible before ``min_new_tokens``; None if there are none.

    Kept from call to call: made anew, it would be an upload to the GPU in each decoding step.
    """
    if not (sampling.min_new_tokens and sampling.stop_token_ids):
        return None
    stops = torch.zeros(vocab_size, dtype=torch.bool)
    stops[list(sampling.stop_token_ids)] = True
    return stops.to(device)


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [B, V] with zeros outside the smallest set of likeliest tokens that reaches ``top_p``."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    likelier = ordered.cumsum(-1) - ordered  # probability of all that come before
    outside = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, likelier >= top_p)
    return probs.masked_fill(outside, 0.0)
