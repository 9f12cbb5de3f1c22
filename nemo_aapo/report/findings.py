"""What to look at in a run, in words with the evidence: rules as data, each a pure function of what the page knows.

A rule says nothing unless there is something to do about it: a page that always warns is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_aapo.report.read import column
from nemo_aapo.report.series import mean, values

Run = Mapping[str, Any]
WINDOW = 20
"""The last so many steps are what a run is like now."""
ENOUGH = 10
"""Steps below which no rule speaks of a trend."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong.

    Example: ``Rule("truncated", "serious", truncated, "raise rollout.max_new_tokens ...", "truncated")``
    """

    name: str
    weight: Literal["serious", "look"]
    evidence: Callable[[Run], str | None]
    """What was seen, with its numbers; None where all is well or nothing is known."""
    remedy: str
    """What to do, or where to look."""
    chart: str
    """Name of the curve that shows it."""


def findings(run: Run) -> list[dict[str, str]]:
    """What is to be said of a run, serious things first.

    Example: ``[{"name": "truncated", "weight": "serious", "text": "31% of completions ...", "remedy": "...", "chart":
    "truncated"}]``
    """
    said = [(rule, evidence) for rule in RULES if (evidence := rule.evidence(run))]
    return [
        {"name": rule.name, "weight": rule.weight, "text": evidence, "remedy": rule.remedy, "chart": rule.chart}
        for rule, evidence in sorted(said, key=lambda pair: pair[0].weight != "serious")
    ]


# ---------------------------------------------------------------- rules


def truncated(run: Run) -> str | None:
    """Completions that are cut give no signal about what their end would have been."""
    now = mean(_last(run, "truncated_fraction"))
    if now is None or now < 0.2:
        return None
    return f"{now:.0%} of completions are cut at rollout.max_new_tokens in the last {_span(run)} steps"


def collapse(run: Run) -> str | None:
    """Entropy that falls far while accuracy does not rise; one that falls as the task is learned is as it should be."""
    entropy, accuracy = values(column(run, "entropy")), values(column(run, _accuracy(run)))
    if len(entropy) < 2 * ENOUGH or len(accuracy) < 2:
        return None
    early, late = mean(entropy[:ENOUGH]) or 0.0, mean(entropy[-ENOUGH:]) or 0.0
    error = _error(run, accuracy[0], accuracy[-1]) or 0.0
    if early < 0.05 or late > 0.3 * early or accuracy[-1] - accuracy[0] > max(2 * error, 0.02):
        return None
    fall = f"entropy fell by {1 - late / early:.0%} (from {early:.2f} to {late:.2f} nats)"
    return f"{fall} while held-out accuracy went from {accuracy[0]:.3f} to {accuracy[-1]:.3f}"


def saturated(run: Run) -> str | None:
    """Most groups are all right: what is left to learn is in few of them, and the margin only pushes on."""
    right, bound = mean(_last(run, "groups/all_right")), mean(_last(run, "margin/at_bound"))
    accuracy = values(column(run, _accuracy(run)))
    if right is None or right < 0.25 or not accuracy or accuracy[-1] > 0.9 or len(_last(run, "entropy")) < ENOUGH:
        return None
    more = f", and the margin of {bound:.0%} of completions is at its bound" if bound else ""
    return f"{right:.0%} of groups are all right{more}, at a held-out accuracy of {accuracy[-1]:.3f}"


def no_signal(run: Run) -> str | None:
    """Groups without any advantage, most of them all wrong: the prompts are too hard for the policy."""
    nothing = mean(_last(run, "groups/zero_advantage"))
    wrong = mean(_last(run, "groups/all_wrong"))
    if nothing is None or nothing < 0.5 or len(_last(run, "groups/zero_advantage")) < ENOUGH or (wrong or 0.0) < 0.3:
        return None
    return f"nothing is learned from {nothing:.0%} of groups, and {wrong or 0:.0%} are all wrong"


def forgetting(run: Run) -> str | None:
    """Held-out accuracy has fallen from its best by more than its standard error explains."""
    accuracy = values(column(run, _accuracy(run)))
    if len(accuracy) < 3:
        return None
    best, now = max(accuracy), accuracy[-1]
    error = _error(run, best, now)
    if error is None or best - now < max(3 * error, 0.03):
        return None
    step = run["validations"]["step"][column(run, _accuracy(run)).index(best)]
    return f"held-out accuracy is {now:.3f} and was {best:.3f} at step {step}: more than three standard errors better"


def gaming(run: Run) -> str | None:
    """The reward rises and held-out accuracy falls."""
    reward, accuracy = values(column(run, "reward/mean")), values(column(run, _accuracy(run)))
    if len(reward) < 2 * ENOUGH or len(accuracy) < 2:
        return None
    risen, fallen = (mean(reward[-ENOUGH:]) or 0) - (mean(reward[:ENOUGH]) or 0), accuracy[0] - accuracy[-1]
    error = _error(run, accuracy[0], accuracy[-1])
    if risen < 0.05 or error is None or fallen < max(3 * error, 0.03):
        return None
    return f"the reward rose by {risen:.3f} while held-out accuracy fell by {fallen:.3f}"


def spikes(run: Run) -> str | None:
    """Single gradient norms far above the others."""
    norms = values(column(run, "grad_norm"))
    if len(norms) < 2 * ENOUGH:
        return None
    recent = norms[len(norms) // 4 :]
    middle = sorted(recent)[len(recent) // 2]
    high = [norm for norm in recent if norm > 20 * middle > 0]
    return f"the gradient norm was above 20 times its median ({middle:.3g}) in {len(high)} steps" if high else None


def disparity(run: Run) -> str | None:
    """The engine samples from another policy than the learner trains, and not only from an earlier one."""
    if any(_last(run, "rollout/lag")):  # the updates in between are in it
        return None
    errors = _last(run, "parity/mult_prob_error")
    worst = max(errors, default=1.0)
    return (
        f"engine and learner differ by a factor of {worst:.3f} a token in the last {len(errors)} steps"
        if worst > 1.05
        else None
    )


def unscored(run: Run) -> str | None:
    """Completions that no reward could score."""
    failed = mean(_last(run, "reward/failed_fraction"))
    return f"scoring failed for {failed:.1%} of completions" if failed is not None and failed > 0.01 else None


def idle(run: Run) -> str | None:
    """Rows of the engine that stand empty while the longest completions end."""
    share, rollout, step = (mean(_last(run, name)) for name in ("rollout/idle_fraction", "time/rollout", "time/step"))
    tail = mean(_last(run, "rollout/tail_factor"))
    if share is None or not step or rollout is None or share < 0.6 or rollout < 0.5 * step or step < 10:
        return None
    longest = f"the longest completion is {tail or 0:.1f} times the mean"
    return f"{share:.0%} of the engine's rows are empty, {longest}, and a rollout takes {rollout / step:.0%} of a step"


def waits_for_rewards(run: Run) -> str | None:
    """Rewards that take longer than generation hides."""
    reward, step = mean(_last(run, "time/reward")), mean(_last(run, "time/step"))
    if reward is None or not step or reward < 0.15 * step or reward < 0.5:
        return None
    return f"a step waits {reward:.1f} of its {step:.1f} s for rewards after the last completion has ended"


def padding(run: Run) -> str | None:
    """Tokens of training passes that are computed for nothing."""
    share = mean(_last(run, "padding_fraction"))
    return f"{share:.0%} of the training passes' tokens are padding" if share is not None and share > 0.4 else None


def interrupted(run: Run) -> str | None:
    """Attempts of this run that failed, were lost or started nothing."""
    failed = [attempt for attempt in run["attempts"] if attempt["end"] in ("failed", "lost", "unstarted")]
    if not failed:
        return None
    return f"{len(failed)} attempts ended in a failure, the last one: {failed[-1]['why'] or 'no reason known'}"


RULES: Sequence[Rule] = (
    Rule(
        "truncated",
        "serious",
        truncated,
        "Raise rollout.max_new_tokens, or look whether these completions repeat themselves (filter: cut).",
        "truncated",
    ),
    Rule(
        "collapse",
        "serious",
        collapse,
        "Lower model.optim.lr, or go back to an earlier checkpoint; look at the lowest log-prob, and whether "
        "completions have become alike.",
        "entropy",
    ),
    Rule(
        "gaming",
        "serious",
        gaming,
        "Read completions with the highest reward: the reward may be got without a right answer.",
        "accuracy",
    ),
    Rule(
        "forgetting",
        "serious",
        forgetting,
        "Take the checkpoint of that step (checkpoint.keep_best), and lower model.optim.lr.",
        "accuracy",
    ),
    Rule(
        "disparity",
        "serious",
        disparity,
        "docs/guide/watching_a_run.md, parity: dtype, stale weights, temperature.",
        "parity",
    ),
    Rule(
        "unscored",
        "serious",
        unscored,
        "Read them (filter: failed scoring); logs/ say why. reward_runner.timeout_s may be too short.",
        "failed",
    ),
    Rule(
        "no_signal",
        "look",
        no_signal,
        "The prompts are too hard for this model: easier data, data.sampling=medium, or a larger group_size.",
        "signal",
    ),
    Rule("saturated", "look", saturated, "The prompts are too easy: harder data, or data.sampling=hard.", "groups"),
    Rule(
        "spikes",
        "look",
        spikes,
        "Look at the completions of those steps; a lower model.optim.clip_grad bounds their effect.",
        "grad",
    ),
    Rule(
        "idle",
        "look",
        idle,
        "A larger prompts_per_step, rollout.async_depth=1, or a lower rollout.max_new_tokens.",
        "idle",
    ),
    Rule("waits_for_rewards", "look", waits_for_rewards, "Raise reward_runner.workers.", "phases"),
    Rule("padding", "look", padding, "model.sequence_packing=true, or a larger max_tokens_per_microbatch.", "padding"),
    Rule("interrupted", "look", interrupted, "See the attempts below, and logs/.", ""),
)
"""All rules; of equal weight the first is shown first."""


def _last(run: Run, metric: str) -> list[float]:
    return values(column(run, metric)[-WINDOW:])


def _span(run: Run) -> int:
    return min(WINDOW, len(column(run, "step")))


def _error(run: Run, one: float, other: float) -> float | None:
    """Standard error of two accuracies: the last that was measured, or sqrt(p (1 - p) / n) of one answer to each of n
    prompts, p their mean; None where no completions of validations are kept."""
    measured = values(column(run, "validation/accuracy_sampled_stderr"))
    if measured:
        return measured[-1]
    share, prompts = (one + other) / 2, run["history"]["count"]
    return math.sqrt(share * (1 - share) / prompts) if prompts else None


def _accuracy(run: Run) -> str:
    """The accuracy that has a standard error, where there is one."""
    sampled = "validation/accuracy_sampled"
    return sampled if values(column(run, sampled)) else "validation/accuracy_greedy"
