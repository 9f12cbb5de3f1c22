"""Checks that reward workers start, tell right from wrong, and are killed when they hang."""

from __future__ import annotations

import math
import os
import time

import numpy as np

from nemo_aapo.config import Config
from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.errors import ConfigError
from nemo_aapo.rewards import build_reward, reward_of
from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.types import Completion, Prompt

ANSWER = "4"
TEXTS = {
    "exact": ("4", "5"),
    "format": ("<think>2 + 2</think><answer>4</answer>", "4"),
}
"""Kind of a reward -> two completions, of which it must give the first a higher value."""
BOXED = ("\\boxed{4}", "\\boxed{5}")
"""The two completions for all other kinds; a custom reward may value them as it likes."""
HOSTILE_LIMIT_S = 1.0
"""Time limit of the reward that never ends."""
KILLED_WITHIN_S = 10.0
"""How much longer than its limit an item may take on a busy machine."""


def rewards(context: Context) -> Finding:
    """Score by the configured rewards in training's own runner, then by one that never ends."""
    name = "rewards"
    try:
        told, problem = score_right_and_wrong(context.run_config)
    except ConfigError as error:
        return Finding(name, "failure", str(error))
    except ValueError as error:
        return Finding(name, "failure", f"rewards, reward_runner: {error}")
    if problem:
        return Finding(name, "failure", problem, "look at the reward's own code and libraries; docs/guide/extending.md")
    if problem := hostile_survives():
        remedy = "without the kill one bad completion stops the run: look at what is allowed to processes here"
        return Finding(name, "failure", problem, remedy)
    return Finding(name, "ok", f"{told}; one that never ends is killed in time")


def score_right_and_wrong(config: Config) -> tuple[str, str]:
    """Each reward's values as text, and what is wrong with them (empty if nothing is).

    Raises:
        ConfigError, ValueError: an impossible reward or setting of the runner.
        RewardError: a worker does not start.
    """
    rewards = [reward_of(entry) for entry in config.rewards]
    judges = [judge for judge, _ in rewards]
    settings = config.reward_runner
    with RewardRunner(rewards, settings.workers, settings.timeout_s) as runner:
        for judge in judges:
            for which, text in zip(("right", "wrong"), texts_of(judge), strict=True):
                runner.submit((judge.name, which), _prompt(), text, _completion())
        results = runner.collect()
    values = []
    for judge in judges:
        right, wrong = results[judge.name, "right"], results[judge.name, "wrong"]
        for which, result in (("right", right), ("wrong", wrong)):
            if math.isnan(result.parts[judge.name]):
                why = f"{result.failure or 'error'}: {result.detail}"
                return "", f"{judge.name}: the {which} answer could not be scored: {why}"
        good, bad = right.parts[judge.name], wrong.parts[judge.name]
        if judge.kind != "custom" and not good > bad:
            return "", f"{judge.name}: {good:g} for the right answer, {bad:g} for the wrong one"
        values.append(f"{judge.name} {good:g} for right, {bad:g} for wrong")
    workers = f"{settings.workers} worker{'s' * (settings.workers != 1)}" if settings.workers else "in process"
    return f"{', '.join(values)} ({workers})", ""


def texts_of(judge: Reward) -> tuple[str, str]:
    """A right completion and a wrong one."""
    return TEXTS.get(getattr(judge, "verifier", judge.kind), BOXED)


def hostile_survives() -> str:
    """What went wrong when a reward that never ends should be killed; empty if it was killed in time."""
    hostile = build_reward({"name": "custom", "function": "nemo_aapo.doctor.checks.hostile:never_ends"})
    with RewardRunner([(hostile, 1.0)], workers=1, timeout_s=HOSTILE_LIMIT_S) as runner:
        assert runner.pool is not None, "a runner with workers has a pool"
        (pid,) = runner.pool.pids
        start = time.monotonic()
        runner.submit(0, _prompt(), "", _completion())
        try:
            result = runner.collect(timeout_s=HOSTILE_LIMIT_S + KILLED_WITHIN_S)[0]
        except TimeoutError:
            return f"a reward that never ends still runs {time.monotonic() - start:.0f} s after its start"
        if result.failure != "timeout":
            return (
                f"a reward that never ends was not killed for its time but ended by {result.failure}: {result.detail}"
            )
        return f"process {pid} of a killed reward is still there" if _exists(pid) else ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _prompt() -> Prompt:
    return Prompt("doctor", np.zeros(1, np.int32), "What is 2 + 2?", ANSWER, "doctor")


def _completion() -> Completion:
    return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)
