"""Micro-batches: every sequence once, within the budget, evenly over the ranks, whatever the lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nemo_aapo.learner.batch_plan import padded_tokens, padding_fraction, plan
from nemo_aapo.learner.microbatch import PrefixGroup, collate, pad_to
from nemo_aapo.mcore.attention.spans import SHORTEST_OF_BATCH, RowAttention, Spans
from nemo_aapo.types import Sample


def reasoning_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal with max/mean between 4 and 5, like reasoning traces."""
    drawn = np.random.default_rng(seed).lognormal(mean=5.0, sigma=0.55, size=count)
    return np.clip(drawn, 8, 2048).astype(int).tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_is_assigned_once_within_the_budget_and_evenly(seed, packed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 200, generator.integers(0, 60)).tolist()
    ranks, multiple = int(generator.integers(1, 5)), int(generator.choice([1, 2, 8]))
    budget = int(generator.integers(208, 1000))
    assigned = plan(lengths, budget=budget, data_parallel_size=ranks, multiple=multiple, packed=packed)
    assert sorted(i for rank in assigned for batch in rank for i in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in assigned}) == 1
    assert assigned[0]
    for batch in (batch for rank in assigned for batch in rank if batch):
        padded = len(batch) * pad_to(max(lengths[i] for i in batch), multiple)
        packs = pad_to(sum(lengths[i] for i in batch), multiple)
        assert padded_tokens([lengths[i] for i in batch], multiple, packed) == (packs if packed else padded) <= budget


def test_sorting_removes_most_padding_of_reasoning_like_lengths():
    lengths = reasoning_lengths(512)
    budget = 8192
    assigned = plan(lengths, budget=budget, data_parallel_size=4)
    sorted_padding = padding_fraction([batch for rank in assigned for batch in rank], lengths)
    in_order = [list(range(start, min(start + 8, 512))) for start in range(0, 512, 8)]
    assert padding_fraction(in_order, lengths) > 0.4
    assert sorted_padding < 0.12


def test_packing_leaves_hardly_any_padding_and_needs_fewer_micro_batches():
    lengths, multiple = reasoning_lengths(512), 128
    padded, packed = (
        plan(lengths, budget=8192, data_parallel_size=4, multiple=multiple, packed=p) for p in (False, True)
    )
    fraction = padding_fraction([batch for rank in packed for batch in rank], lengths, multiple, packed=True)
    assert fraction < 0.01
    assert len(packed[0]) < len(padded[0])


@pytest.mark.parametrize("seed", range(5))
def test_no_rank_has_much_more_to_do_than_the_average(seed):
    lengths = reasoning_lengths(512, seed)
    assigned = plan(lengths, budget=4096, data_parallel_size=4)
    longest = [[(len(batch), max(lengths[i] for i in batch)) for batch in rank] for rank in assigned]
    tokens = [sum(rows * length for rows, length in rank) for rank in longest]
    squares = [sum(rows * length**2 for rows, length in rank) for rank in longest]
    assert max(tokens) < 1.1 * np.mean(tokens)
    assert max(squares) < 1.2 * np.mean(squares)


def test_a_sequence_over_the_budget_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"65 tokens exceeds max_tokens_per_microbatch=64"):
        plan([3, 65], budget=64, data_parallel_size=1)


def test_positions_select_the_state_that_predicts_each_completion_token():
    samples = [
        Sample(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32), np.zeros(2, np.float32), 1.0),
        Sample(np.array([3], np.int32), np.array([4], np.int32), np.zeros(1, np.float32), -1.0),
    ]
    batch = collate(PrefixGroup.separate(samples), [0.5, 0.25], multiple=4, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]]
    states = torch.arange(8)[:, None] * 10 + torch.arange(2)  # [s, b]: ten times the position, plus the row
    assert states.flatten()[batch.positions].tolist() == [20, 30, 1]
    assert batch.targets.tolist() == [8, 9, 4]
    assert batch.advantages.tolist() == [1.0, 1.0, -1.0]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25]


def test_packed_sequences_stand_end_to_end_and_the_padding_is_one_of_its_own():
    samples = [
        Sample(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32), np.zeros(2, np.float32), 1.0),
        Sample(np.array([3], np.int32), np.array([4], np.int32), np.zeros(1, np.float32), -1.0),
    ]
    batch = collate(PrefixGroup.separate(samples), [0.5, 0.25], multiple=4, device=torch.device("cpu"), packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.longest == 5
    assert batch.positions.tolist() == [2, 3, 5]
    assert batch.targets.tolist() == [8, 9, 4]
    whole = collate(PrefixGroup.separate(samples), [0.5, 0.25], multiple=7, device=torch.device("cpu"), packed=True)
    assert whole.cu_seqlens.tolist() == [0, 5, 7]


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_micro_batch_has_a_row_and_no_token(packed):
    batch = collate([], [], multiple=2, device=torch.device("cpu"), packed=packed)
    assert batch.input_ids.shape == (1, 2)
    assert batch.targets.numel() == batch.weights.numel() == 0


def random_group(generator: np.random.Generator, prompt: int, count: int) -> list[Sample]:
    prompt_ids = generator.integers(2, 90, prompt).astype(np.int32)
    return [
        Sample(prompt_ids, generator.integers(2, 90, n).astype(np.int32), np.full(n, -1.0, np.float32), float(n))
        for n in generator.integers(1, 40, count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_prefix_groups_keep_every_sample_once_within_the_budget_and_as_few_as_their_order_allows(seed):
    generator = np.random.default_rng(seed)
    samples = random_group(generator, int(generator.integers(1, 30)), int(generator.integers(0, 20)))
    budget = int(generator.integers(70, 400))
    groups = PrefixGroup.split(samples, budget)
    assert sorted(map(id, (s for group in groups for s in group.samples))) == sorted(map(id, samples))
    assert all(group.sequence_tokens <= budget for group in groups)
    assert [len(g.samples) for g in PrefixGroup.split(samples, 1)] == [1] * len(samples)  # each is too long: alone
    for group, following in itertools.pairwise(groups):
        assert group.sequence_tokens + following.samples[0].length > budget
    for group in groups:
        assert group.row_tokens == len(group.prompt_ids) + sum(len(s.completion_ids) for s in group.samples)
    assert [s.length for group in groups for s in group.samples] == sorted((s.length for s in samples), reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_attention_sees_whole_sequences_of_a_row_whose_prompts_stand_there_once(seed):
    generator = np.random.default_rng(seed)
    groups = [random_group(generator, int(generator.integers(1, 20)), int(generator.integers(2, 7))) for _ in range(3)]
    shared = [part for group in groups for part in PrefixGroup.split(group, 150)]
    samples = [sample for part in shared for sample in part.samples]
    multiple = int(generator.choice([1, 4, 16]))
    batch = collate(shared, [1.0] * len(samples), multiple=multiple, device=torch.device("cpu"), packed=True)
    row, positions = batch.input_ids[0], batch.position_ids[0]
    assert len(row) == pad_to(sum(part.row_tokens for part in shared), multiple)
    bounds = batch.cu_seqlens.tolist()
    first = 0
    for (start, stop), sample in zip(itertools.pairwise(bounds), samples, strict=False):
        tokens = batch.expand[start:stop]
        whole = np.concatenate([sample.prompt_ids, sample.completion_ids]).tolist()
        assert row[tokens].tolist() == whole
        assert positions[tokens].tolist() == list(range(len(whole)))
        predicting = batch.positions[first : first + len(sample.completion_ids)]
        assert predicting.tolist() == tokens[len(sample.prompt_ids) - 1 : -1].tolist()
        first += len(sample.completion_ids)
    assert batch.expand[batch.contract].tolist() == list(range(len(row)))

    seen = tokens_seen(batch.row)
    for tokens in (batch.expand[start:stop] for start, stop in itertools.pairwise(bounds)):
        for i, token in enumerate(tokens.tolist()):
            assert sorted(seen[token]) == sorted(tokens[: i + 1].tolist())


def tokens_seen(row: RowAttention) -> list[list[int]]:
    """What each token of a row attends to."""
    seen = [list(range(start, i + 1)) for start, stop in bounds_of(row.own.queries) for i in range(start, stop)]
    if row.shared is not None:
        for queries, keys in zip(bounds_of(row.shared.queries), bounds_of(row.shared.keys), strict=True):
            for token in row.shared.query_tokens[slice(*queries)].tolist():
                seen[token] += row.shared.key_tokens[slice(*keys)].tolist()
    return seen


def bounds_of(bounds: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds.tolist()))


@pytest.mark.parametrize("seed", range(10))
def test_spans_of_like_lengths_are_padded_to_batches_that_hold_each_token_once(seed):
    lengths = np.random.default_rng(seed).lognormal(3, 1, 40).astype(int) + 1
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    batches, place, _ = Spans.causal(bounds, torch.device("cpu")).batches
    flat = torch.cat([batch.queries.flatten() for batch in batches])
    assert flat[place].tolist() == list(range(bounds[-1]))
    is_padding = torch.ones(len(flat), dtype=torch.bool).index_fill_(0, place, False)
    firsts = np.cumsum([0, *(batch.queries.numel() for batch in batches)])[:-1].tolist()
    found = torch.cat([first + batch.padding for first, batch in zip(firsts, batches, strict=True)])
    assert is_padding.nonzero()[:, 0].tolist() == found.tolist()
    assert len(flat) <= bounds[-1] / SHORTEST_OF_BATCH


def test_prefix_groups_of_one_are_ordinary_sequences():
    samples = random_group(np.random.default_rng(0), 5, 4)
    batch = collate(PrefixGroup.separate(samples), [1.0] * 4, multiple=1, device=torch.device("cpu"), packed=True)
    assert batch.expand is None
    assert batch.contract is None
    assert batch.input_ids.shape[1] == sum(sample.length for sample in samples)
