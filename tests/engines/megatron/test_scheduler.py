"""The scheduler, driven by a stand-in for the model that lets a row see nothing but what its cache holds."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_aapo.engines.megatron import scheduler as scheduler_module
from nemo_aapo.engines.megatron.scheduler import Scheduler, capacity


def next_token(context: list[int], seed: int, step: int) -> int:
    """What the stand-in samples: a pure function of the row's whole context, its seed and the step. 0 stops."""
    return hash((tuple(context), seed, step)) % 7


def one_at_a_time(prompt: np.ndarray, seed: int, max_new_tokens: int) -> list[int]:
    out: list[int] = []
    while len(out) < max_new_tokens and 0 not in out:
        out.append(next_token([*prompt.tolist(), *out], seed, len(out)))
    return out


class Simulation:
    """The engine's loop over ``Scheduler``, with lists of tokens in place of keys and values."""

    def __init__(self, prompts, seeds, max_new_tokens: int, rows: int) -> None:
        self.scheduler = Scheduler(prompts, seeds, max_new_tokens, rows)
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.cache: list[list[int]] = [[] for _ in range(rows)]
        self.kept: list[int] = []
        self.finished: dict[tuple[int, int], list[int]] = {}
        self.prefills: list[list[int]] = []  # prompts prefilled, step by step
        self.running: list[int] = []

    def run(self) -> None:
        while self.step():
            pass

    def step(self) -> bool:
        scheduler = self.scheduler
        admitted = scheduler.admit()
        if not scheduler.running:
            return False
        prefills = [admission for admission in admitted if admission.prefill]
        decoding = prefills[0].start if prefills else scheduler.running
        for admission in admitted:
            for row in range(admission.start, admission.stop):
                prompt = self.prompts[admission.prompt].tolist()
                self.cache[row] = list(prompt) if admission.prefill else list(self.kept)
                assert admission.prefill == (row >= decoding)
        for row in range(decoding):
            del self.cache[row][scheduler.length[row] :]
            assert len(self.cache[row]) == scheduler.length[row]
            self.cache[row].append(int(scheduler.token[row]))
        if prefills and prefills[-1].keep:
            self.kept = self.prompts[prefills[-1].prompt].tolist()
        self.prefills.append([admission.prompt for admission in prefills])
        self.running.append(scheduler.running)
        rows = range(scheduler.running)
        tokens = np.array([next_token(self.cache[r], int(scheduler.seed[r]), int(scheduler.sampled[r])) for r in rows])
        scheduler.record(np.arange(scheduler.running), tokens, -tokens.astype(float), decoding)
        done = np.flatnonzero((tokens == 0) | (scheduler.sampled[: scheduler.running] == self.max_new_tokens))
        for row in done:
            out = scheduler.tokens[row, : scheduler.sampled[row]]
            assert (scheduler.logprobs[row, : scheduler.sampled[row]] == -out).all()
            key = int(scheduler.prompt[row]), int(scheduler.completion[row])
            assert key not in self.finished
            self.finished[key] = out.tolist()
        for source, target in zip(*scheduler.retire(done), strict=True):
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
def test_batched_sequences_come_out_as_if_generated_one_at_a_time(seed, rows):
    prompts, seeds, max_new_tokens = workload(seed)
    simulation = Simulation(prompts, seeds, max_new_tokens, rows)
    simulation.run()
    expected = {
        (i, j): one_at_a_time(prompts[i], name, max_new_tokens)
        for i, row in enumerate(seeds)
        for j, name in enumerate(row)
    }
    assert simulation.finished == expected
    assert max(simulation.running, default=0) <= rows
    left = [prompt for prompt, row in zip(simulation.scheduler.prompts, seeds, strict=True) if row and len(prompt)]
    assert not left  # of sequences that have ended nothing is kept: a call in flight goes on for as long as a run


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
    assert all(running == 5 for running in simulation.running[: waiting_until + 1])
    tail = simulation.running[waiting_until:]
    assert tail == sorted(tail, reverse=True)  # empty rows are not computed
    assert sum(simulation.running) == sum(map(len, simulation.finished.values()))


def test_a_prefill_pass_is_bounded_but_never_empty(monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", 20)
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


def test_a_graphs_rows_hold_the_running_ones_and_no_more_than_the_cache_has():
    from nemo_aapo.engines.megatron.cuda_graphs import padded_rows

    for rows in (1, 7, 40, 100, 256):
        sizes = [padded_rows(running, rows) for running in range(1, rows + 1)]
        assert all(running <= size <= rows for running, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
    assert len(set(sizes)) == 5  # of 256 rows: few graphs to capture
