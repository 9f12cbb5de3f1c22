"""The loop with fakes for all its parts: what happens in which order, and what is left after a stop or an error."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from nemo_aapo.algorithms import Algorithm
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.compose import load_config
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import CheckpointError, Interrupted, LostRankError, NonFiniteError, ParityError, RewardError
from nemo_aapo.run.metrics_file import MetricsFile, is_validation, read_metrics
from tests.training.fakes import (
    APART,
    STEPS,
    fails_with,
    happen,
    make,
)


@pytest.fixture(scope="module")
def config():
    """Five steps, a validation and a checkpoint every two."""
    words = ["model.path=/m", "data.train=/t", "data.validation=/v", "algorithm=gpg", "run.dir=/run"]
    words += ["prompts_per_step=2", "group_size=2", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=2"]
    return load_config([*words, "checkpoint.save_interval=2"])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """The loop's collectives among one rank, without a process group."""
    monkeypatch.setattr(parallel, "any_rank", lambda *flags: list(flags))
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)


# ---------------------------------------------------------------- a whole run


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


# ---------------------------------------------------------------- stopped and resumed

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


# ---------------------------------------------------------------- errors


def test_a_save_in_the_background_that_has_failed_ends_the_run_after_the_step(config):
    trainer = make(config)
    happen(trainer, "log 3", lambda: setattr(trainer.checkpoints, "broken", True))
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.fit()
    assert trainer.reporter.journal[-3:] == ["log 3", "wait", "close"]
    assert max(trainer.checkpoints.disk) == 2


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize(
    ("line", "done"), [("fill 3", 3), ("generate 3 by 3", 3), ("validate 4", 4), ("generate 0 by 0", 0)]
)
def test_rewards_that_fail_for_everything_end_the_run_with_a_checkpoint_of_its_last_step(
    config, line, done, runs_ahead
):
    line = line.replace("3 by 3", "3 by 2") if runs_ahead else line
    disk, updates = {}, []
    trainer = make(config, disk, runs_ahead)
    happen(trainer, line, fails_with(RewardError("not one completion could be scored")))
    with pytest.raises(RewardError, match="not one completion"):
        trainer.fit()
    assert trainer.reporter.journal[-2:] == ["wait", "close"]
    assert max(disk, default=0) == done
    updates += trainer.reporter.journal.of("update")
    resumed = make(config, disk, runs_ahead)
    assert resumed.fit()
    assert updates + resumed.reporter.journal.of("update") == [f"update {k}" for k in range(STEPS)]
    assert ("validate 4" in resumed.reporter.journal) == (done != 4 or line == "validate 4")


def test_a_save_that_fails_ends_the_run(config):
    trainer = make(config)
    happen(trainer, "save 4", fails_with(CheckpointError("the disk is full")))
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.fit()
    assert trainer.reporter.journal[-2:] == ["save 4", "close"]
    assert max(trainer.checkpoints.disk) == 2


def test_a_disagreement_before_the_first_update_changes_no_weight(config):
    trainer = make(config)
    trainer.learner.agrees = APART
    with pytest.raises(ParityError, match=r"before the first step: engine and learner disagree"):
        trainer.fit()
    assert not trainer.reporter.journal.of("update", "save")


def test_a_resumed_run_that_trains_on_earlier_policies_completions_compares_its_own_engine_before_an_update(config):
    disk = {}
    trainer = make(config, disk, runs_ahead=True)
    happen(trainer, "log 3", lambda: setattr(trainer.reporter, "stop", True))
    assert not trainer.fit()
    assert disk[3]["files"] == {"pending": b"{3: 2}"}
    resumed = make(config, disk, runs_ahead=True)
    resumed.learner.agrees = APART
    with pytest.raises(ParityError, match=r"before the first step: engine and learner disagree"):
        resumed.fit()
    assert resumed.reporter.journal == ["pending of step_3", "begin_at 3", "refit to 3", "parity", "close"]


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_later_disagreement_stops_the_run_or_is_said(config, on_error):
    trainer = make(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, on_parity_error=on_error)))
    happen(trainer, "generate 2 by 2", lambda: setattr(trainer.learner, "later", APART))
    if on_error == "stop":
        with pytest.raises(ParityError, match=r"step 3: engine and learner disagree.*last checkpoint is as it was"):
            trainer.fit()
        assert max(trainer.checkpoints.disk) == 2
    else:
        assert trainer.fit()
        warnings = [note for note in trainer.reporter.notes if note.startswith("warning: step")]
        assert [warning.split(":")[1] for warning in warnings] == [" step 3", " step 4", " step 5"]


def test_completions_of_an_earlier_policy_are_not_held_against_the_learner(config):
    trainer = make(config, runs_ahead=True)
    happen(trainer, "generate 1 by 0", lambda: setattr(trainer.learner, "later", APART))
    assert trainer.fit()
    assert not [note for note in trainer.reporter.notes if note.startswith("warning")]


def test_an_update_that_is_not_finite_ends_the_run_and_keeps_the_batch_of_all_ranks(config, monkeypatch):
    trainer = make(config)
    monkeypatch.setattr(parallel, "gather_on_first_rank", lambda rows: [rows, ["another rank's"]])
    happen(trainer, "update 2", fails_with(NonFiniteError("gradient norm inf")))
    with pytest.raises(NonFiniteError, match=r"step 3: gradient norm inf.*/run/rollouts/failed_step_000003\.jsonl"):
        trainer.fit()
    ((name, rows),) = trainer.reporter.saved
    assert name == "failed_step_000003"
    assert len(rows) == 4 + 1
    assert rows[-1] == "another rank's"
    assert max(trainer.checkpoints.disk) == 2


def test_log_probs_that_are_not_finite_name_the_step(config):
    trainer = make(config)
    happen(trainer, "generate 3 by 3", fails_with(FloatingPointError("log-probs are not finite")))
    with pytest.raises(NonFiniteError, match=r"step 4, rollout: log-probs are not finite\. No checkpoint was written"):
        trainer.fit()
    assert max(trainer.checkpoints.disk) == 2


def test_log_probs_that_are_not_finite_in_a_validation_are_a_message_too(config):
    trainer = make(config)
    happen(trainer, "validate 2", fails_with(FloatingPointError("log-probs are not finite")))
    with pytest.raises(NonFiniteError, match=r"the validation after step 2: log-probs are not finite"):
        trainer.fit()


PHASES = {
    "begin_at -1": "the start",
    "validate 0": "the validation after step 0",
    "fill 2": "the reference rewards of step 3",
    "generate 2 by 2": "step 3, rollout",
    "parity": "step 1, parity",
    "update 2": "step 3, train",
    "refit to 3": "step 3, refit",
    "save 2": "the checkpoint of step 2",
    "wait": "the checkpoint of step 5",
}


@pytest.mark.parametrize("line", PHASES)
def test_a_lost_rank_is_reported_with_the_phase_it_was_lost_in(config, line):
    trainer = make(config)
    happen(trainer, line, fails_with(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")))
    with pytest.raises(LostRankError, match=f"ended at {PHASES[line]}: another rank is gone"):
        trainer.fit()
    assert trainer.reporter.journal[-1] == "close"
