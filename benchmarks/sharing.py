"""An optimizer step with prompts that completions share beside one with a copy for each, by the prompt's length."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, in_turns, ratio
from benchmarks.workload import Workload, make_input, make_trainer
from nemo_aapo.types import Completion, Group, Prompt


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    hidden_size: int = 256
    prompts: int = 4
    group_size: int = 8
    completion: int = 64
    """Tokens of every completion."""
    prompt_tokens: tuple[int, ...] = (16, 64, 256)
    steps: int = 5
    """Measured steps of each kind."""


QUICK = Plan(hidden_size=32, prompts=2, group_size=2, completion=4, prompt_tokens=(16,), steps=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    prompt: int
    completion: int
    shared: Figure
    """CPU milliseconds of a step with shared prompts."""
    apart: Figure
    """... and of one with a prompt for each completion."""
    ratio: Figure
    """The first over the second, turn by turn."""
    tokens: float
    """Tokens that the layers compute, the first's over the second's."""


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Steps of both kinds in turns, on the same groups and the same model of 4 layers. folder: gets the model."""
    longest = max(plan.prompt_tokens) + plan.completion
    workload = Workload(hidden_size=plan.hidden_size, positions=max(longest, 64), algorithm="gpg")
    make_input(workload, folder)
    with contextlib.ExitStack() as stack:
        learner = make_trainer(workload, folder, stack).learner
        learner = dataclasses.replace(learner, max_tokens_per_microbatch=plan.prompts * plan.group_size * longest)
        kinds = {name: dataclasses.replace(learner, share_prompts=name == "shared") for name in ("shared", "apart")}
        rows = []
        for length in plan.prompt_tokens:
            groups = _groups(plan, length)
            steps = {name: functools.partial(kind.update, groups) for name, kind in kinds.items()}
            timings = in_turns(steps, plan.steps)
            cpu = {name: Figure.of([1000 * timing.cpu for timing in timings[name]]) for name in kinds}
            both = ratio(timings["shared"], timings["apart"], "cpu")
            tokens = (length / plan.group_size + plan.completion) / (length + plan.completion)
            rows.append(Row(length, plan.completion, cpu["shared"], cpu["apart"], both, tokens))
        return rows


def _groups(plan: Plan, prompt: int) -> list[Group]:
    generator = np.random.default_rng(0)

    def group(i: int) -> Group:
        completions = tuple(
            Completion(
                generator.integers(2, 90, plan.completion).astype(np.int32), np.full(plan.completion, -4.0), "stop", 0
            )
            for _ in range(plan.group_size)
        )
        nothing = np.zeros(plan.group_size)
        return Group(
            prompt=Prompt(str(i), generator.integers(2, 90, prompt).astype(np.int32), "", "", ""),
            completions=completions,
            texts=(),
            rewards=nothing,
            reward_parts={},
            failed=nothing.astype(bool),
            advantages=generator.normal(size=plan.group_size),
        )

    return [group(i) for i in range(plan.prompts)]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["prompt, tokens", "completion", "shared, CPU ms", "each its own, CPU ms", "ratio", "ratio of tokens"]
    return header, [
        [f"{r.prompt:,}", f"{r.completion:,}", r.shared.text(), r.apart.text(), r.ratio.text(2), f"{r.tokens:.2f}"]
        for r in rows
    ]
