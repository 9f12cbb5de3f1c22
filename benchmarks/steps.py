"""The cost of a training step: GPG, AAPO with stored reference rewards, AAPO with fresh ones each step.

One process holds a trainer for each, on the quickstart's task with a random model of the quickstart's size, and they
take steps in turns. The reward is a coin toss by the tokens, so that nearly every group has a signal in all three and
they train on the same number of sequences; the learning rate is too small to change their lengths.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Figure, in_turns, ratio
from benchmarks.workload import Silent
from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt
from nemo_aapo.utils import tables

ALGORITHMS = {
    "GPG": "gpg",
    "AAPO, stored reference rewards": "aapo",
    "AAPO, fresh reference rewards": "aapo_paper",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    prompts_per_step: int = 16
    new_tokens: tuple[int, ...] = (8, 40)
    """Completion lengths: the quickstart's, and the longest that its model takes."""
    steps: int = 12
    """Measured steps of each algorithm."""


QUICK = Plan(prompts_per_step=4, new_tokens=(4,), steps=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Ratios are of its cost to GPG's."""

    algorithm: str
    new_tokens: int
    """The limit, which nearly all completions of a random model reach."""
    milliseconds: Figure
    """Milliseconds of a step."""
    ratio: Figure
    ratio_cpu: Figure
    generation_ratio: float
    """Ratio of the engine's CPU time, for completions of policy and reference together."""


@dataclass(frozen=True)
class CoinToss(Reward):
    """A reward of 1 for an even sum of token ids, else 0."""

    kind = "coin_toss"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return float(completion.token_ids.sum() % 2 == 0)


class _Meter:
    """CPU seconds of each of an engine's calls."""

    def __init__(self, engine: Any) -> None:
        self._seconds: list[float] = []
        self._generate, engine.generate = engine.generate, self.generate

    def generate(self, *arguments: Any) -> Any:
        began = time.process_time()
        try:
            return self._generate(*arguments)
        finally:
            self._seconds.append(time.process_time() - began)

    def per_step(self, steps: int) -> float:
        """The median call times the number of calls in each of so many steps."""
        return median(self._seconds) * len(self._seconds) / steps


def compare(plan: Plan, folder: Path) -> list[Row]:
    """Measure steps of the algorithms in turns, for each length.

    Args:
        folder: gets the model, the data and the store.
    """
    _make_input(folder)
    return [row for new_tokens in plan.new_tokens for row in _compare(plan, folder, new_tokens)]


def _compare(plan: Plan, folder: Path, new_tokens: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        trainers = {
            name: _trainer(plan, folder, algorithm, new_tokens, stack) for name, algorithm in ALGORITHMS.items()
        }
        meters = {name: _Meter(trainer.rollouts.collector.engine) for name, trainer in trainers.items()}
        timings = in_turns({name: trainer.train_step for name, trainer in trainers.items()}, plan.steps)
    base = next(iter(ALGORITHMS))
    generation = {name: meter.per_step(plan.steps + 1) for name, meter in meters.items()}  # one step is a warm-up
    return [
        Row(
            algorithm=name,
            new_tokens=new_tokens,
            milliseconds=Figure.of([1000 * timing.wall for timing in timings[name]]),
            ratio=ratio(timings[name], timings[base], "wall"),
            ratio_cpu=ratio(timings[name], timings[base], "cpu"),
            generation_ratio=generation[name] / generation[base],
        )
        for name in ALGORITHMS
    ]


def _trainer(plan: Plan, folder: Path, algorithm: str, new_tokens: int, stack: contextlib.ExitStack) -> Any:
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.training.build import build_training

    config = load_config(
        [
            "experiment=quickstart",
            f"algorithm={algorithm}",
            f"run.dir={folder / algorithm / str(new_tokens)}",
            f"model.path={folder / 'model'}",
            f"data.train={folder / 'train.jsonl'}",
            f"data.validation={folder / 'train.jsonl'}",
            f"prompts_per_step={plan.prompts_per_step}",
            f"rollout.max_new_tokens={new_tokens}",
            f"rollout.max_concurrent_tokens={plan.prompts_per_step * 8 * (16 + new_tokens)}",
            "trainer.devices=1",
            "model.optim.lr=1e-9",
        ]
    )
    rewards = RewardRunner([(CoinToss(), 1.0)], workers=0, timeout_s=10.0)
    job = resolve(config, 1, given=("rewards",))
    trainer = build_training(job, reporter=Silent(), stack=stack, rewards=rewards)
    stack.callback(trainer.kept.wait)  # what still writes to the folder, which goes
    trainer.rollouts.fill_reference(0, lambda done, total: None, lambda: False)
    return trainer


def _make_input(folder: Path) -> None:
    """A random model of the quickstart's size, and as many sums as an epoch of a few steps."""
    from examples.quickstart import arithmetic
    from examples.quickstart.base_model import Recipe, new_model

    tokenizer = arithmetic.make_tokenizer()
    new_model(Recipe(), tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    arithmetic.write_prompts(folder / "train.jsonl", arithmetic.split_sums(0).training[:128])


def report(rows: Sequence[Row]) -> str:
    """The table."""
    header = ("step of", "new tokens", "milliseconds", "over GPG's", "by CPU time", "its generation's")
    lines = [
        (
            row.algorithm,
            str(row.new_tokens),
            row.milliseconds.text(),
            row.ratio.text(2),
            f"{row.ratio_cpu.median:.2f}",
            f"{row.generation_ratio:.2f}",
        )
        for row in rows
    ]
    return tables.plain(header, lines)
