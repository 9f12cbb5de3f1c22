"""Each rule speaks where its symptom is, with its numbers, and none where a run learns as it should."""

from __future__ import annotations

import re

import pytest

from nemo_aapo.report.findings import RULES, findings
from nemo_aapo.report.series import columns
from tests.report.made_runs import CURVES, validation

pytestmark = pytest.mark.unit


def run_of(steps: int = 40, attempts=(), **changed) -> dict:
    """What the page knows of a run whose metrics are those of a healthy one but for some.

    Args:
        changed: metric, with ``__`` for ``/`` -> its value as a function of the share of the run that is done.
    """
    curves = {**CURVES, **{name.replace("__", "/"): curve for name, curve in changed.items()}}
    lines = [{"step": s, **{name: curve(s / steps) for name, curve in curves.items()}} for s in range(1, steps + 1)]
    validations = [validation(s, curves, s / steps) for s in range(0, steps + 1, max(1, steps // 4))]
    tables = {"steps": columns(lines), "validations": columns(validations)}
    return {**tables, "attempts": list(attempts), "history": {"count": 30}}


SYMPTOMS = {
    "truncated": ({"truncated_fraction": lambda done: 0.31}, "31% of completions are cut"),
    "collapse": (
        {"entropy": lambda done: 0.6 * (1 - done) + 0.02, "validation__accuracy": lambda done: 0.3},
        "entropy fell by 8.% .* accuracy went from 0.300 to 0.300",
    ),
    "gaming": (
        {"validation__accuracy": lambda done: 0.5 - 0.2 * done},
        r"reward rose by 0\.\d+ while held-out accuracy fell by 0\.200",
    ),
    "forgetting": (
        {"validation__accuracy": lambda done: 0.3 + 0.4 * min(done, 1.2 - done)},
        "held-out accuracy is 0.380 and was 0.500 at step 20",
    ),
    "disparity": ({"parity__mult_prob_error": lambda done: 1.02 + 0.1 * done}, "differ by a factor of 1.120"),
    "unscored": ({"reward__failed_fraction": lambda done: 0.05}, "scoring failed for 5.0%"),
    "no_signal": (
        {"groups__zero_advantage": lambda done: 0.7, "groups__all_wrong": lambda done: 0.6},
        "nothing is learned from 70% of groups, and 60% are all wrong",
    ),
    "saturated": (
        {"groups__all_right": lambda done: 0.28, "margin__at_bound": lambda done: 0.28},
        "28% of groups are all right, and the margin of 28% of completions is at its bound",
    ),
    "spikes": (
        {"grad_norm": lambda done: 90.0 if done == 0.75 else 1.0},
        r"above 20 times its median \(1\) in 1 steps",
    ),
    "idle": (
        {
            "rollout__idle_fraction": lambda done: 0.8,
            "rollout__tail_factor": lambda done: 6.0,
            "time__rollout": lambda done: 60.0,
            "time__step": lambda done: 80.0,
        },
        "80% of the engine's rows are empty, the longest completion is 6.0 times the mean, and a rollout takes 75%",
    ),
    "waits_for_rewards": (
        {"time__reward": lambda done: 5.0, "time__step": lambda done: 12.0},
        "waits 5.0 of its 12.0 s for rewards",
    ),
    "padding": ({"padding_fraction": lambda done: 0.55}, "55% of the training passes' tokens are padding"),
    "interrupted": (
        {"attempts": [{"end": "finished", "why": ""}, {"end": "lost", "why": "node7 did not answer"}]},
        "1 attempts ended in a failure, the last one: node7 did not answer",
    ),
}


def test_every_rule_has_its_symptom_here():
    assert [rule.name for rule in RULES] == list(SYMPTOMS)


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_rule_speaks_of_its_symptom_with_the_evidence(name):
    changed, words = SYMPTOMS[name]
    said = {finding["name"]: finding["text"] for finding in findings(run_of(**changed))}
    assert re.search(words, said[name]), said
    assert len(said) == 1 or name in ("collapse", "gaming", "forgetting"), said  # which come together


@pytest.mark.parametrize("steps", [1, 2, 5, 40, 3_000])
def test_nothing_is_said_of_a_run_that_learns(steps):
    assert findings(run_of(steps)) == []


def test_nothing_is_said_of_a_task_that_is_learned_to_its_end():
    """As in the quickstart: entropy goes, groups are all right and carried by the margin, since accuracy nears 1."""
    learned = {
        "entropy": lambda done: 0.5 * (1 - done) ** 2 + 0.05,
        "validation__accuracy": lambda done: 0.29 + 0.68 * min(1.0, 2 * done),
        "groups__all_right": lambda done: 0.75 * done,
        "groups__zero_std": lambda done: 0.75 * done,
        "margin__at_bound": lambda done: 0.5,
        "grad_norm": lambda done: 3.0 - 2.0 * done,
    }
    assert findings(run_of(100, **learned)) == []


def test_an_accuracy_without_a_standard_error_has_that_of_its_prompts():
    """Greedy alone: of 30 prompts 17 and then 15 is nothing, and of a thousand it is something; unknown, nothing."""
    run, rights = run_of(reward__mean=lambda done: 0.3), [16, 17, 15]
    run["validations"] = {"step": [0, 20, 40], "validation/accuracy_greedy": [right / 30 for right in rights]}
    said = {count: [f["name"] for f in findings({**run, "history": {"count": count}})] for count in (0, 30, 1_000)}
    assert said == {0: [], 30: [], 1_000: ["forgetting"]}


def test_updates_between_sampling_and_learning_are_no_disagreement_of_engine_and_learner():
    differ, late = {"parity__mult_prob_error": lambda done: 1.4}, {"rollout__lag": lambda done: 2.0}
    assert "disparity" in [finding["name"] for finding in findings(run_of(**differ))]
    assert "disparity" not in [finding["name"] for finding in findings(run_of(**differ, **late))]


def test_a_run_without_a_metric_or_a_step_is_no_error():
    assert findings({"steps": {}, "validations": {}, "attempts": []}) == []
    assert findings({"steps": {"step": [1, 2], "entropy": [None, None]}, "validations": {}, "attempts": []}) == []
