"""What the model or the data says costs its limit at most: endless mathematics, damaged LaTeX, gold answers."""

from __future__ import annotations

import math
import random
import time

import pytest

from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from tests.rewards.judging import completion, mutate, prompt

LIMIT_S = 3.0
"""What a hostile item costs; the others take milliseconds, and must stay within it on a busy machine too."""
SLACK_S = 60.0
"""What a busy machine may add before a test calls a wait too long."""

HOSTILE_MATH = [
    "9^9^9^9",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "\\boxed{1000000!}",
    "1 2 " * 250_000,
    "\\boxed{" + "9" * 1_000_000 + "}",
    "\\boxed{" * 100_000,
    "\\frac{" * 100_000,
    "so 1 and 2, " * 850_000 + "\\boxed{71}",
    "\\boxed{" + "9" * 10_000_000,
]


@pytest.mark.slow
def test_hostile_mathematics_costs_its_limit_and_leaves_the_others_alone():
    rewards = [(build_reward({"name": "accuracy"}), 1.0)]
    begin = time.monotonic()
    with RewardRunner(rewards, workers=2, timeout_s=LIMIT_S) as runner:
        start = time.monotonic()
        to_start_s = start - begin  # on this machine, now: what a worker that was killed costs besides
        for n, text in enumerate(HOSTILE_MATH):
            runner.submit(("hostile", n), prompt(), text, completion())
            runner.submit(("right", n), prompt(), "\\boxed{72}", completion())
            runner.submit(("wrong", n), prompt(), "\\boxed{71}", completion())
        results = runner.collect()
        seconds = time.monotonic() - start
    assert {results["right", n].score for n in range(len(HOSTILE_MATH))} == {1.0}
    assert {results["wrong", n].score for n in range(len(HOSTILE_MATH))} == {0.0}
    hostile = [results["hostile", n] for n in range(len(HOSTILE_MATH))]
    assert all(math.isnan(r.score) if r.failure else r.score == 0.0 for r in hostile)
    assert runner.stats.timeouts == sum(r.failure == "timeout" for r in hostile) >= 2
    assert runner.stats.scored == 3 * len(HOSTILE_MATH)
    assert seconds < len(HOSTILE_MATH) * (LIMIT_S + 1.5 * to_start_s) / 2 + SLACK_S


@pytest.mark.slow
def test_gold_answers_are_checked_under_the_limit_too():
    with RewardRunner([(build_reward({"name": "accuracy"}), 1.0)], workers=1, timeout_s=LIMIT_S) as runner:
        runner.check_answer("\\frac{1}{2}")
        with pytest.raises(ValueError, match="can't parse"):
            runner.check_answer("\\frac{1}{")
        with pytest.raises(ValueError, match="took longer than 3 s"):
            runner.check_answer("9^{9^{9^{9}}}")
        runner.check_answer("3")
    with (
        RewardRunner([(build_reward({"name": "integer"}), 1.0)], workers=0, timeout_s=1) as runner,
        pytest.raises(ValueError, match="not an integer"),
    ):
        runner.check_answer("x")


@pytest.mark.slow
def test_mutated_completions_through_accuracy_cost_no_other_item():
    rng = random.Random(5)
    seeds = ["So it is \\boxed{\\frac{1}{2}}.", "It is $x = 3$, 72 or \\boxed{72}", "The answer is 1,234.5\\%."]
    rewards = [(build_reward({"name": "accuracy"}), 1.0)]
    with RewardRunner(rewards, workers=2, timeout_s=5 * LIMIT_S) as runner:
        for n in range(2000):
            runner.submit(n, prompt(), mutate(rng.choice(seeds), rng), completion())
            if n % 20 == 0:
                runner.submit(("right", n), prompt(), "\\boxed{72}", completion())
        results = runner.collect()
    assert {results[key].score for key in results if isinstance(key, tuple)} == {1.0}
    assert {result.score for result in results.values() if result.failure is None} <= {0.0, 1.0}
    assert all(math.isnan(result.score) == (result.failure is not None) for result in results.values())
    assert sum(result.failure is not None for result in results.values()) < 20
