"""The cost of rewards: items per second on one core, and the time that hostile input takes.

Completions have the form of GSM8K's worked solutions: a paragraph of sums and a boxed number, one in three is wrong.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.measure import Figure
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.types import Completion, Prompt
from nemo_aapo.utils import tables

HOSTILE = {
    "9^{9^{9^{9}}}": lambda: "\\boxed{9^{9^{9^{9}}}}",
    "400 nested parentheses": lambda: "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "1000000!": lambda: "\\boxed{1000000!}",
    "10 MB of text": lambda: "so 1 and 2, " * 850_000 + "\\boxed{72}",
    "10 MB in one box": lambda: "\\boxed{" + "9" * 10_000_000 + "}",
    "10 MB of open boxes": lambda: "\\boxed{" * 1_400_000,
}
"""Name -> a function that makes the hostile completion."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurement."""

    items: int = 3000
    repeats: int = 5
    limit_s: float = 2.0
    rewards: tuple[dict[str, Any], ...] = (
        {"name": "accuracy"},
        {"name": "integer"},
        {"name": "multiple_choice"},
        {"name": "format"},
        {"name": "tag_count"},
        {"name": "cosine", "max_tokens": 512},
        {"name": "overlong", "max_tokens": 512, "buffer_tokens": 128},
        {"name": "repetition"},
    )


QUICK = Plan(items=30, repeats=1, limit_s=0.5, rewards=({"name": "accuracy"}, {"name": "integer"}))


@dataclass(frozen=True)
class Speed:
    """The speed of one reward."""

    reward: str
    items_per_cpu_second: Figure


@dataclass(frozen=True)
class Cost:
    """The cost of one hostile completion, behind which another item waits."""

    what: str
    seconds: float
    outcome: str
    other_score: float = field(default=0.0)
    """Score of the harmless item behind it, 1.0 if all is well."""


def speeds(plan: Plan) -> list[Speed]:
    """Items per CPU second of this process, which scores them as a worker does."""
    found = []
    for config in plan.rewards:
        reward = build_reward(config)
        reward.load()
        items = make_items(plan.items, "B" if config["name"] == "multiple_choice" else None)
        rates = [_rate(reward, items) for _ in range(plan.repeats)]
        found.append(Speed(config["name"], Figure.of(rates)))
    return found


def hostile(plan: Plan) -> list[Cost]:
    """Measure each hostile completion under a time limit, in a worker process."""
    costs = []
    with RewardRunner([(build_reward({"name": "accuracy"}), 1.0)], workers=1, timeout_s=plan.limit_s) as runner:
        for what, make in HOSTILE.items():
            costs.append(_cost(runner, what, make))
    return costs


def make_items(count: int, letter: str | None = None) -> list[tuple[Prompt, str, Completion]]:
    """(prompt, completion's text, completion) of GSM8K's form; with a letter, its multiple-choice form."""
    rng = random.Random(0)
    items = []
    for n in range(count):
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        gold = str(a * b + c)
        said = gold if rng.random() < 2 / 3 else str(a * b - c)
        steps = "".join(
            f"Each of the {a} boxes holds {b} pears, so that makes {a} * {b} = {a * b} pears in row {k}. "
            for k in range(rng.randint(1, 6))
        )
        text = f"<think>\n{steps}With {c} more it is {a * b} + {c} = {said}.\n</think>\n"
        text += f"<answer>\nThe answer is \\boxed{{{letter or said}}}.\n</answer>"
        tokens = np.zeros(len(text) // 3, np.int32)
        prompt = Prompt(str(n), tokens[:8], "How many pears?", letter or gold, "benchmark")
        items.append((prompt, text, Completion(tokens, np.zeros(len(tokens), np.float32), "stop", 0)))
    return items


def report(found: list[Speed], costs: list[Cost]) -> str:
    """Two tables."""
    rows = [(speed.reward, speed.items_per_cpu_second.text()) for speed in found]
    hostile_rows = [(c.what, f"{c.seconds:.2f}", c.outcome, f"{c.other_score:g}") for c in costs]
    return (
        "Items a CPU second, median (lowest to highest)\n"
        + tables.plain(("reward", "items/s"), rows)
        + "\n\nHostile completions, reward accuracy\n"
        + tables.plain(("completion", "seconds", "outcome", "score of the next item"), hostile_rows)
    )


def _rate(reward: Reward, items: list[tuple[Prompt, str, Completion]]) -> float:
    start = time.process_time()
    for prompt, text, completion in items:
        reward(prompt, text, completion)
    return len(items) / max(time.process_time() - start, 1e-9)


def _cost(runner: RewardRunner, what: str, make: Callable[[], str]) -> Cost:
    (prompt, _, completion), *_ = make_items(1)
    text = make()
    start = time.perf_counter()
    runner.submit("hostile", prompt, text, completion)
    result = runner.collect()["hostile"]
    seconds = time.perf_counter() - start
    runner.submit("next", prompt, f"\\boxed{{{prompt.answer}}}", completion)
    return Cost(what, seconds, result.failure or f"score {result.score:g}", runner.collect()["next"].score)
