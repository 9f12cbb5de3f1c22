"""The loop with fakes for all its parts: what happens in which order."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from nemo_aapo.distributed import parallel
from tests.training.fakes import (
    STEPS,
    make,
)


def test_a_run_does_what_it_does_in_this_order(config):
    trainer = make(config)
    assert trainer.fit()
    step = "fill {0}|generate {0} by {0}|update {0}|refit to {1}|log {1}"
    first, second, third, fourth, fifth = (step.format(k, k + 1).split("|") for k in range(STEPS))
    first.insert(2, "parity")
    validated = "settle|validate {0}|sync|save {0}"
    assert trainer.reporter.journal == [
        "begin_at -1", "settle", "validate 0",
        *first, *second, *validated.format(2).split("|"),
        *third, *fourth, *validated.format(4).split("|"),
        *fifth, *validated.format(5).split("|"), "wait", "close",
    ]  # fmt: skip


def test_one_step_ahead_the_next_rollout_begins_after_a_refit_and_before_it_is_waited_for_this_steps(config):
    trainer = make(config, runs_ahead=True)
    assert trainer.fit()
    seen = trainer.reporter.journal.of("generate", "begin", "update", "refit")
    assert seen[:9] == [
        "begin 0 by 0", "begin 1 by 0", "generate 0 by 0", "update 0",
        "refit to 1", "begin 2 by 1", "generate 1 by 0", "update 1", "refit to 2",  # for the validation
    ]  # fmt: skip
    assert [line for line in seen if line.startswith("generate")] == [
        "generate 0 by 0", "generate 1 by 0", "generate 2 by 1", "generate 3 by 2", "generate 4 by 3",
    ]  # fmt: skip
    assert trainer.reporter.metrics[-1]["rollout/lag"] == 1
    assert trainer.checkpoints.disk[2]["files"] == {"pending": b"{2: 1}"}


@pytest.mark.parametrize(("interval", "steps"), [(0, []), (1, [0, 1, 2, 3, 4, 5]), (3, [0, 3, 5]), (9, [0, 5])])
def test_validations_come_before_the_first_step_at_their_interval_and_at_the_end(config, interval, steps):
    trainer = make(
        dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, val_check_interval=interval))
    )
    assert trainer.fit()
    assert trainer.reporter.journal.of("validate") == [f"validate {step}" for step in steps]


def test_a_complete_run_that_is_started_again_does_nothing(config):
    disk = {}
    assert make(config, disk).fit()
    again = make(config, disk)
    assert again.fit()
    assert again.reporter.journal == ["pending of step_5", "begin_at 5", "refit to 5", "wait", "close"]


def test_a_checkpoint_keeps_what_the_next_step_depends_on(config):
    trainer = make(config)
    trainer.fit()
    state = trainer.checkpoints.disk[4]
    assert state.keys() == {
        "step", "policy_version", "seed", "sampler", "reference", "completion_lengths", "metrics", "files",
    }  # fmt: skip
    assert (state["step"], state["policy_version"], state["sampler"]) == (4, 4, 4)
    assert state["metrics"]["loss"] == 0.5
    assert state["metrics"]["validation/accuracy_greedy"] == 0.25
    assert not [name for name in state["metrics"] if name.startswith("time/") or name == "kl"]  # times, and NaN


def test_speed_is_that_of_all_that_was_generated_and_work_that_of_what_was_trained_on(config, monkeypatch):
    monkeypatch.setattr(parallel, "exchange_data_parallel", lambda outgoing: list(itertools.chain(*outgoing)))
    trainer = make(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, oversample=3.0)))
    generate = trainer.rollouts.generate
    trainer.rollouts.generate = lambda step: generate(step) * 3
    assert trainer.fit()
    found = trainer.reporter.metrics[-1]
    assert (found["tokens/generated"], found["tokens/trained"]) == (24, 8)  # of 6 groups, and of 2


ACCURACY = {0: 0.1, 2: 0.9, 4: 0.2, 5: 0.3}


@pytest.mark.parametrize(
    ("best", "interval", "saved"),
    [
        (None, 1, [1, 2, 3, 4, 5]),
        ("validation/accuracy_greedy", 1, [1, 2, 3, 4, 5]),
        ("validation/accuracy_greedy", 3, [2, 3, 4, 5]),
        ("validation/accuracy_greedy", 50, [2, 4, 5]),
        ("reward/mean", 50, [5]),
    ],
)
def test_a_checkpoint_has_the_accuracy_of_its_own_weights_or_none_and_the_best_one_is_saved(
    config, best, interval, saved
):
    trainer = make(
        dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, keep_best=best, save_interval=interval)
        )
    )
    trainer.validator.run = lambda: ({"validation/accuracy_greedy": ACCURACY[trainer.policy.version]}, [])
    assert trainer.fit()
    states = trainer.checkpoints.disk
    assert {step: state["metrics"].get("validation/accuracy_greedy") for step, state in states.items()} == {
        step: ACCURACY.get(step) for step in saved
    }
