"""Seconds in which one engine generates a list of completions, decoding step by decoding step."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_aapo.planning import compute, memory
from nemo_aapo.planning.hardware import Rates
from nemo_aapo.planning.inputs import Inputs

StepSeconds = Callable[[int, float], float]
"""Seconds of one decoding step of so many sequences, at their mean number of tokens so far."""


@dataclass(frozen=True)
class Engine:
    """One engine, as far as its time goes. A finished sequence leaves at once, and a waiting one takes its row."""

    rows: int
    """Sequences that run at a time."""
    step_s: StepSeconds
    prompt_tokens: float
    """Mean length of a prompt."""
    prefill_s: float = 0.0
    """Seconds of one prompt's prefill, which all its completions share."""

    def seconds(self, groups: Sequence[Sequence[int]]) -> float:
        """Seconds in which the completions of these lengths, by prompt, are generated."""
        waiting = [length for group in groups for length in group]
        waiting.reverse()
        live: list[tuple[int, int]] = []  # the step at which it ends, its length
        step, context, seconds = 0, 0.0, self.prefill_s * len(groups)
        while waiting or live:
            while waiting and len(live) < self.rows:
                length = waiting.pop()
                heapq.heappush(live, (step + length, length))
                context += self.prompt_tokens
            steps = live[0][0] - step
            seconds += steps * self.step_s(len(live), context / len(live) + steps / 2)
            step, context = step + steps, context + steps * len(live)
            while live and live[0][0] == step:
                context -= self.prompt_tokens + heapq.heappop(live)[1]
        return seconds


def engine_of(inputs: Inputs, rates: Rates) -> Engine:
    """The engine of a plan at its lower bounds: weights, keys and values over bandwidth, or FLOPs that take longer."""
    gpus = inputs.layout.tensor if inputs.engine.kind == "megatron" else inputs.engine.gpus
    numbers = "fp32" if inputs.engine.kind == "megatron" and inputs.learner.numbers == "fp32" else "bf16"

    def computing_s(tokens: float, pairs: float, scored: float) -> float:
        return compute.forward(inputs, tokens, pairs, scored).seconds(rates, numbers) / gpus

    @functools.cache
    def lines(rows: int) -> tuple[float, float, float, float]:
        """Both bounds are straight lines over the context: value at 0 and slope of each."""
        moving, computing = compute.decode_step_seconds(inputs, rates, rows, 0), computing_s(rows, 0, rows)
        return (
            moving,
            compute.decode_step_seconds(inputs, rates, rows, 1) - moving,
            computing,
            computing_s(rows, rows, rows) - computing,
        )

    def step_s(rows: int, context: float) -> float:
        moving, more_moving, computing, more_computing = lines(rows)
        return max(moving + more_moving * context, computing + more_computing * context)

    prompt = inputs.work.prompt_tokens
    return Engine(memory.rows_at_a_time(inputs), step_s, prompt, computing_s(prompt, prompt**2 / 2, 1))
