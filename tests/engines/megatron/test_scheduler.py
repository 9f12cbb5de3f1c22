"""Slot bookkeeping, driven by a stand-in for the model that lets a row see nothing but what its cache holds."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_aapo.engines.megatron import scheduler as slots_module
from nemo_aapo.engines.megatron.scheduler import Slots, capacity


def next_token(context: list[int], seed: int, drawn: int) -> int:
    """What the stand-in draws: a pure function of the row's whole context, its seed and the step. 0 stops."""
    return hash((tuple(context), seed, drawn)) % 7


def one_at_a_time(prompt: np.ndarray, seed: int, max_new_tokens: int) -> list[int]:
    out: list[int] = []
    while len(out) < max_new_tokens and 0 not in out:
        out.append(next_token([*prompt.tolist(), *out], seed, len(out)))
    return out


class Simulation:
    """The engine's loop over ``Slots``, with lists of tokens in place of keys and values."""

    def __init__(self, prompts, seeds, max_new_tokens: int, rows: int) -> None:
        self.slots = Slots(prompts, seeds, max_new_tokens, rows)
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.cache: list[list[int]] = [[] for _ in range(rows)]
        self.kept: list[int] = []
        self.finished: dict[tuple[int, int], list[int]] = {}
        self.prefills: list[list[int]] = []  # prompts prefilled, step by step
        self.live: list[int] = []

    def run(self) -> None:
        while self.step():
            pass

    def step(self) -> bool:
        slots = self.slots
        entered = slots.admit()
        if not slots.live:
            return False
        fresh = [admission for admission in entered if admission.prefill]
        decoding = fresh[0].start if fresh else slots.live
        for admission in entered:
            for row in range(admission.start, admission.stop):
                prompt = self.prompts[admission.prompt].tolist()
                self.cache[row] = list(prompt) if admission.prefill else list(self.kept)
                assert admission.prefill == (row >= decoding)
        for row in range(decoding):
            del self.cache[row][slots.length[row] :]
            assert len(self.cache[row]) == slots.length[row]
            self.cache[row].append(int(slots.token[row]))
        if fresh and fresh[-1].keep:
            self.kept = self.prompts[fresh[-1].prompt].tolist()
        self.prefills.append([admission.prompt for admission in fresh])
        self.live.append(slots.live)
        rows = range(slots.live)
        tokens = np.array([next_token(self.cache[r], int(slots.seed[r]), int(slots.drawn[r])) for r in rows])
        slots.record(tokens, -tokens.astype(float), decoding)
        done = np.flatnonzero((tokens == 0) | (slots.drawn[: slots.live] == self.max_new_tokens))
        for row in done:
            out = slots.tokens[row, : slots.drawn[row]]
            assert (slots.logprobs[row, : slots.drawn[row]] == -out).all()
            key = int(slots.prompt[row]), int(slots.completion[row])
            assert key not in self.finished
            self.finished[key] = out.tolist()
        for source, target in zip(*slots.retire(done), strict=True):
            self.cache[target] = list(self.cache[source])
        return True


def workload(seed: int):
    generator = np.random.default_rng(seed)
    prompts = [
        generator.integers(0, 9, generator.integers(1, 12)).astype(np.int32) for _ in range(generator.integers(1, 12))
    ]
    seeds = [generator.integers(0, 2**62, generator.integers(0, 6)).tolist() for _ in prompts]
    return prompts, seeds, int(generator.integers(1, 15))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("seed", range(12))
def test_batched_sequences_come_out_as_if_drawn_one_at_a_time(seed, rows):
    prompts, seeds, max_new_tokens = workload(seed)
    simulation = Simulation(prompts, seeds, max_new_tokens, rows)
    simulation.run()
    expected = {
        (i, j): one_at_a_time(prompts[i], name, max_new_tokens)
        for i, row in enumerate(seeds)
        for j, name in enumerate(row)
    }
    assert simulation.finished == expected
    assert max(simulation.live, default=0) <= rows


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_each_prompt_is_prefilled_once_in_the_given_order(rows):
    prompts, seeds, max_new_tokens = workload(3)
    simulation = Simulation(prompts, seeds, max_new_tokens, rows)
    simulation.run()
    order = [i for step in simulation.prefills for i in step]
    assert order == [i for i, row in enumerate(seeds) if row]


def test_rows_are_refilled_at_once_and_closed_up_when_nothing_waits():
    prompts, seeds = [np.full(3, i, np.int32) for i in range(6)], [list(range(4))] * 6
    simulation = Simulation(prompts, seeds, max_new_tokens=9, rows=5)
    simulation.run()
    waiting_until = max(step for step, prefilled in enumerate(simulation.prefills) if prefilled)
    assert all(live == 5 for live in simulation.live[: waiting_until + 1])
    tail = simulation.live[waiting_until:]
    assert tail == sorted(tail, reverse=True)  # dead rows are not computed
    assert sum(simulation.live) == sum(map(len, simulation.finished.values()))


def test_a_prefill_pass_is_bounded_but_never_empty(monkeypatch):
    monkeypatch.setattr(slots_module, "MAX_PREFILL_TOKENS", 20)
    prompts = [np.zeros(length, np.int32) for length in (30, 9, 8, 8, 1)]
    simulation = Simulation(prompts, [[1], [2], [3], [4], [5]], max_new_tokens=3, rows=8)
    simulation.run()
    # 30 alone is over the bound but must pass; 9 + 9 fit, a third padded to 9 doesn't; 8 and 1 padded to 8 do
    assert [step for step in simulation.prefills if step] == [[0], [1, 2], [3, 4]]
    assert len(simulation.finished) == 5


def test_the_budget_decides_the_number_of_rows():
    assert capacity(1000, longest=96, sequences=64) == 10
    assert capacity(1000, longest=96, sequences=4) == 4
    assert capacity(96, longest=96, sequences=64) == 1
    with pytest.raises(ValueError, match=r"97 tokens .* rollout.max_concurrent_tokens=96: raise it to at least 97"):
        capacity(96, longest=97, sequences=1)


def test_a_graphs_rows_hold_the_live_ones_and_no_more_than_the_cache_has():
    from nemo_aapo.engines.megatron.cuda_graphs import padded_rows

    for rows in (1, 7, 40, 100, 256):
        sizes = [padded_rows(live, rows) for live in range(1, rows + 1)]
        assert all(live <= size <= rows for live, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
    assert len(set(sizes)) == 5  # of 256 rows: few graphs to capture
