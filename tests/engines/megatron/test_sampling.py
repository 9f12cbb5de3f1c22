"""Sampling: the right distribution, from streams that depend on nothing but their seed and the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nemo_aapo.engines.megatron.sampling import exponential_noise, mix64_, sample
from nemo_aapo.types import SamplingSpec

pytestmark = pytest.mark.exact

SAMPLED = SamplingSpec(temperature=1.0, max_new_tokens=8, stop_token_ids=())
ROUNDED_UP = [(228062, 8), (412067, 26), (1060035, 2)]
"""Streams with, at their first step, a uniform number that float32 rounds up to 1 (one in 2**25), and its place."""


def streams(count: int, steps: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and steps [count * steps]: each of ``count`` streams at each of ``steps`` steps."""
    return torch.arange(count).repeat_interleave(steps), torch.arange(steps).repeat(count)


def splitmix64_finaliser(x: int) -> int:
    """Unsigned arithmetic, as published."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64_whatever_the_sign_of_its_argument():
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    hashed = mix64_(torch.from_numpy(numbers.copy())).tolist()
    assert [h % 2**64 for h in hashed] == [splitmix64_finaliser(int(n) % 2**64) for n in numbers]


def test_noise_is_exponential_and_independent_of_its_neighbours():
    seeds, steps = streams(400, 25)
    noise = exponential_noise(seeds, steps, 21).double()
    ordered = noise.flatten().sort().values
    empirical = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (empirical - -torch.expm1(-ordered)).abs().max() * len(ordered) ** 0.5 < 1.63  # Kolmogorov, 1 %
    cube = noise.view(400, 25, 21) - 1.0  # variance 1: the mean product of neighbours is their correlation
    for a, b in ((cube[1:], cube[:-1]), (cube[:, 1:], cube[:, :-1]), (cube[..., 1:], cube[..., :-1])):
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_drawn_tokens_are_distributed_as_the_softmax(temperature):
    logits = torch.randn(31, generator=torch.Generator().manual_seed(1)) * 2
    spec = SamplingSpec(temperature=temperature, max_new_tokens=8, stop_token_ids=())
    expected = torch.softmax(logits.double() / temperature, -1).numpy()
    for seeds, steps in (streams(40_000), streams(1, 40_000), streams(200, 200)):
        tokens, logprobs = sample(logits.expand(len(seeds), -1), spec, seeds, steps, 31)
        counts = np.bincount(tokens.numpy(), minlength=31)
        rare = expected * len(seeds) < 5  # the chi-square test wants at least five expected in each cell
        observed = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(expected[~rare], expected[rare].sum()) * len(seeds)
        chi_square, freedom = ((observed - wanted) ** 2 / wanted.clip(1)).sum(), len(wanted) - 1
        assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5  # 99.9 % in the normal approximation
        np.testing.assert_allclose(logprobs, np.log(expected)[tokens], atol=1e-5)


def test_a_token_depends_on_its_own_row_only():
    generator = torch.Generator().manual_seed(2)
    logits, (seeds, steps) = torch.randn(60, 37, generator=generator), streams(12, 5)
    tokens, logprobs = sample(logits, SAMPLED, seeds, steps, 37)
    order = torch.randperm(60, generator=generator)
    shuffled, _ = sample(logits[order], SAMPLED, seeds[order], steps[order], 37)
    assert torch.equal(shuffled, tokens[order])
    for row in (0, 17, 59):
        one = slice(row, row + 1)
        alone = sample(logits[one], SAMPLED, seeds[one], steps[one], 37)
        assert alone[0] == tokens[row]
        assert alone[1] == pytest.approx(float(logprobs[row]), abs=1e-6)


def test_rounding_errors_of_the_logits_hardly_ever_change_a_token():
    generator = torch.Generator().manual_seed(3)
    seeds, steps = streams(20, 250)
    logits = torch.randn(len(seeds), 500, generator=generator)
    wobble = torch.randn(logits.shape, generator=generator) * 1e-3
    tokens, _ = sample(logits, SAMPLED, seeds, steps, 500)
    others, _ = sample(logits + wobble, SAMPLED, seeds, steps, 500)
    assert (tokens != others).float().mean() < 2e-3  # about 0.8e-3; inverting the CDF gives 11e-3


def test_different_seeds_and_steps_give_different_tokens():
    seeds, steps = streams(1000, 2)
    tokens, _ = sample(torch.zeros(len(seeds), 5000), SAMPLED, seeds, steps, 5000)
    first, second = tokens.view(1000, 2).T
    assert len(first.unique()) > 850  # 906 expected of 1000 draws from 5000
    assert (first == second).sum() < 5
    huge = torch.tensor([2**63 - 1, 2**63 - 2, 0])
    assert len(sample(torch.zeros(3, 10**6), SAMPLED, huge, torch.zeros_like(huge), 10**6)[0].unique()) == 3


@pytest.mark.parametrize(("seed", "index"), ROUNDED_UP)
def test_no_rounding_of_the_noise_makes_an_impossible_token_win_or_the_only_possible_one_lose(seed, index):
    stream, step = torch.tensor([seed]), torch.tensor([0])
    assert exponential_noise(stream, step, 64)[0, index] == pytest.approx(24 * math.log(2))  # the latest of all
    for logit, wins in ((-30.0, False), (200.0, True)):
        logits = torch.zeros(1, 64)
        logits[0, index] = logit
        tokens, logprobs = sample(logits, SAMPLED, stream, step, 64)
        assert (tokens[0] == index) == wins
        assert logprobs[0].isfinite()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_padding_of_the_vocabulary_is_neither_drawn_nor_counted(temperature):
    logits = torch.randn(300, 24, generator=torch.Generator().manual_seed(4))
    logits[:, 20:] = 50.0
    spec = SamplingSpec(temperature=temperature, max_new_tokens=8, stop_token_ids=())
    seeds, steps = streams(300)
    tokens, logprobs = sample(logits, spec, seeds, steps, 20)
    assert tokens.max() < 20
    expected = torch.log_softmax(logits[:, :20] / (temperature or 1.0), -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)


def test_greedy_takes_the_likeliest_and_reports_its_logprob_at_temperature_one():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    seeds, steps = streams(50)
    spec = SamplingSpec(temperature=0.0, max_new_tokens=8, stop_token_ids=())
    tokens, logprobs = sample(logits, spec, seeds, steps, 30)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.float(), -1).max(-1).values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_impossible_before_min_new_tokens_and_only_then(temperature):
    logits = torch.zeros(400, 10)
    logits[:, [3, 7]] = 8.0
    seeds, steps = streams(100, 4)
    spec = SamplingSpec(temperature=temperature, max_new_tokens=8, stop_token_ids=(3, 7), min_new_tokens=2)
    tokens, logprobs = sample(logits, spec, seeds, steps, 10)
    stops = (tokens == 3) | (tokens == 7)
    assert not stops[steps < 2].any()
    assert stops[steps >= 2].float().mean() > 0.9
    # the other eight are equally likely when the stop tokens are out
    torch.testing.assert_close(logprobs[steps < 2], torch.full((200,), -np.log(8.0), dtype=torch.float32))


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    seeds, steps = streams(20_000)
    for top_p, kept in ((0.3, [1]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (0.99, [0, 1, 2, 3, 4])):
        spec = SamplingSpec(temperature=1.0, max_new_tokens=8, stop_token_ids=(), top_p=top_p)
        tokens, logprobs = sample(probabilities.log().expand(20_000, -1), spec, seeds, steps, 5)
        counts = np.bincount(tokens.numpy(), minlength=5)
        assert np.flatnonzero(counts).tolist() == kept
        wanted = probabilities[kept] / probabilities[kept].sum()
        np.testing.assert_allclose(counts[kept] / 20_000, wanted, atol=0.02)
        torch.testing.assert_close(logprobs, probabilities.log()[tokens])  # of the whole softmax
