"""The loop with fakes for all its parts: what is left after a stop, and what a resumed run does."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.algorithms import Algorithm
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.errors import CheckpointError, Interrupted
from nemo_aapo.run.metrics_file import MetricsFile, is_validation, read_metrics
from tests.training.fakes import (
    STEPS,
    fails_with,
    happen,
    make,
)

STOPS = {  # where the signal comes: the steps that are done then
    "fill 2": 2,
    "generate 2 by 2": 3,
    "update 2": 3,
    "refit to 3": 3,
    "log 3": 3,
    "log 2": 2,
    "validate 2": 2,
    "save 2": 2,
    "fill 0": 0,
    "parity": 1,
    "validate 0": 0,
}


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("phase", STOPS)
def test_a_stop_in_any_phase_ends_with_a_checkpoint_of_the_last_step_and_a_resumed_run_does_the_rest(
    config, phase, runs_ahead
):
    done = STOPS[phase]
    if runs_ahead:
        phase = {"generate 2 by 2": "generate 2 by 1", "refit to 3": "begin 3 by 2"}.get(phase, phase)
    disk, updates = {}, []
    trainer = make(config, disk, runs_ahead)
    happen(trainer, phase, lambda: setattr(trainer.reporter, "stop", True))
    assert not trainer.fit()
    assert trainer.step == max(disk, default=0) == done
    assert trainer.reporter.journal[-1] == "close"
    updates += trainer.reporter.journal.of("update")
    resumed = make(config, disk, runs_ahead)
    assert resumed.fit()
    assert resumed.reporter.journal.of("begin_at") == [f"begin_at {done or -1}"]
    updates += resumed.reporter.journal.of("update")
    assert updates == [f"update {k}" for k in range(STEPS)]  # each once, whichever part of the run did it
    assert resumed.reporter.journal.of("parity") == ["parity"]  # engine and learner are compared in every process


BROKEN_OFF = {  # what waits for others as the stop comes: the steps that are done then, and the same one step ahead
    "fill 2": (2, 2),
    "generate 2 by 2": (2, None),
    "generate 2 by 1": (None, 2),
    "refit to 2": (2, 2),
    "refit to 3": (3, 3),
    "begin 3 by 2": (None, 2),
    "settle": (0, 0),
    "refit to 5": (5, 5),
    "validate 5": (5, 5),
}


@pytest.mark.parametrize(
    ("line", "runs_ahead"),
    [(line, ahead) for line, done in BROKEN_OFF.items() for ahead in (0, 1) if done[ahead] is not None],
)
def test_a_stop_that_breaks_off_a_wait_loses_no_step_and_makes_none_twice(config, line, runs_ahead):
    done, disk, updates = BROKEN_OFF[line][runs_ahead], {}, []
    trainer = make(config, disk, bool(runs_ahead))

    def stopped():
        trainer.reporter.stop = True
        raise Interrupted

    happen(trainer, line, stopped)
    assert not trainer.fit()
    assert trainer.step == max(disk, default=0) == done
    updates += trainer.reporter.journal.of("update")
    resumed = make(config, disk, bool(runs_ahead))
    assert resumed.fit()
    assert updates + resumed.reporter.journal.of("update") == [f"update {k}" for k in range(STEPS)]
    validated = {*trainer.reporter.journal.of("validate"), *resumed.reporter.journal.of("validate")}
    assert validated == {"validate 0", "validate 2", "validate 4", "validate 5"}


@dataclasses.dataclass(frozen=True)
class Clock(Algorithm):
    """Advantages and metrics that say at which step they were asked for."""

    def advantages(self, groups):
        return groups.rewards + groups.step

    def token_loss(self, tokens):
        raise AssertionError("the learner is another one here")

    def metrics(self, groups, advantages):
        return {"clock/advantages": (advantages - groups.rewards).max(), "clock/metrics": groups.step}


def test_an_algorithms_schedule_goes_on_where_a_stopped_run_was(config):
    disk, seen = {}, []
    for stop in (True, False):
        trainer = make(config, disk)
        trainer.objective = Objective.of(config.algorithm, 4, Clock())
        if stop:
            happen(trainer, "log 3", lambda trainer=trainer: setattr(trainer.reporter, "stop", True))
        assert trainer.fit() is not stop
        seen += [(metrics["clock/advantages"], metrics["clock/metrics"]) for metrics in trainer.reporter.metrics]
    assert seen == [(step, step) for step in range(STEPS)]


def test_a_resumed_runs_engine_has_the_policys_weights_before_it_generates(config):
    disk = {}
    trainer = make(config, disk)
    happen(trainer, "log 3", lambda: setattr(trainer.reporter, "stop", True))
    trainer.fit()
    resumed = make(config, disk)
    resumed.fit()
    assert resumed.reporter.journal[:4] == ["pending of step_3", "begin_at 3", "refit to 3", "fill 3"]


def test_a_run_that_was_further_already_is_complete_and_does_nothing(config):
    """Commands refuse it before (``run.directory``); here it must not be taken for a run that was stopped."""
    disk = {}
    assert make(config, disk).fit()
    shorter = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=3))
    again = make(shorter, disk)
    assert again.fit()
    assert not again.reporter.journal.of("update", "save", "validate")


def test_a_stop_breaks_off_a_validation_which_the_resumed_run_makes_up_for(config):
    disk = {}
    trainer = make(config, disk)

    def stopped():
        trainer.reporter.stop = True
        raise Interrupted

    happen(trainer, "validate 2", stopped)
    assert not trainer.fit()
    assert max(disk) == 2
    resumed = make(config, disk)
    assert resumed.fit()
    assert resumed.reporter.journal.of("validate") == ["validate 2", "validate 4", "validate 5"]
    assert resumed.reporter.journal.index("validate 2") < resumed.reporter.journal.index("fill 2")
    assert not [state for step, state in disk.items() if step > 2 and "validation/broken_off" in state["metrics"]]


@pytest.mark.parametrize("end", ["killed in the next step", "stopped in the export"])
def test_a_validation_that_is_made_up_for_has_one_line_whatever_ends_the_run_before_its_next_checkpoint(
    config, end, tmp_path
):
    at = {"killed in the next step": 2, "stopped in the export": 5}[end]
    disk = {}

    def part(line=None, then=None):
        trainer = make(config, disk)
        trainer.reporter.file = MetricsFile(tmp_path / "metrics.jsonl")
        happen(trainer, line, then and (lambda: then(trainer)))
        try:
            return trainer.fit()
        except KeyboardInterrupt:  # which the loop handles no more than a kill
            return None

    def stop(trainer):
        trainer.reporter.stop = True
        raise Interrupted

    def kill(trainer):
        raise KeyboardInterrupt

    assert part(f"validate {at}", stop) is False
    assert part("update 2", kill) is (None if at == 2 else True)  # the export comes after that
    assert part() is True
    lines = [(line["step"], is_validation(line)) for line in read_metrics(tmp_path / "metrics.jsonl")]
    steps = [(step, False) for step in range(1, STEPS + 1)]
    assert lines == sorted(steps + [(step, True) for step in (0, 2, 4, 5)])


def test_a_stop_in_the_first_validation_ends_the_run_before_any_step(config):
    trainer = make(config)
    happen(trainer, "validate 0", fails_with(Interrupted()))
    assert not trainer.fit()
    assert not trainer.reporter.journal.of("fill", "generate", "save")


def test_a_checkpoint_of_another_version_is_said_to_be_one(config):
    disk = {}
    make(config, disk).fit()
    del disk[5]["metrics"]
    with pytest.raises(CheckpointError, match="of another version"):
        make(config, disk).fit()
