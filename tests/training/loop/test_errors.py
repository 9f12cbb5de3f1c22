"""The loop with fakes for all its parts: what is left after an error."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.distributed import parallel
from nemo_aapo.errors import CheckpointError, LostRankError, NonFiniteError, ParityError, RewardError
from tests.training.fakes import (
    APART,
    STEPS,
    fails_with,
    happen,
    make,
)


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
    assert resumed.reporter.notes == ["warning: drawn later than 1 others"]  # what the pipeline says of what it took up
    assert not [note for note in trainer.reporter.notes if "later" in note]


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


@pytest.mark.parametrize(
    ("phase", "said", "saved"),
    [
        ("generate 3 by 3", r"step 4, rollout: log-probs are not finite\. No checkpoint was written", [2]),
        ("validate 2", r"the validation after step 2: log-probs are not finite", []),
    ],
)
def test_log_probs_that_are_not_finite_name_where_they_are(config, phase, said, saved):
    trainer = make(config)
    happen(trainer, phase, fails_with(FloatingPointError("log-probs are not finite")))
    with pytest.raises(NonFiniteError, match=said):
        trainer.fit()
    assert list(trainer.checkpoints.disk) == saved


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
