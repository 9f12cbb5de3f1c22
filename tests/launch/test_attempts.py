"""When a job is requeued and when a run is given up; what is known of jobs; what a rank is told."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from nemo_aapo.errors import NoAnswerError, SlurmError
from nemo_aapo.launch.slurm.attempts import Attempt, History, decide, read_history, summary, write_history
from nemo_aapo.launch.slurm.commands import JobState, parse_sacct, parse_scontrol, parse_squeue, slurm
from nemo_aapo.launch.slurm.control import describe
from nemo_aapo.launch.slurm.rank import PLACE, fill_in, own_gpus, rank_environment
from nemo_aapo.launch.slurm.roles import first_fault
from nemo_aapo.run.state import RunState


def attempt(end: str, before: int = 0, after: int = 0, step: int | None = None) -> Attempt:
    return Attempt("7", 0, 0.0, before, end, 60.0, after, after if step is None else step, 1234, "because")


@pytest.mark.parametrize(
    ("attempts", "requeue", "why"),
    [
        ([attempt("finished", 0, 9)], False, "complete"),
        ([attempt("saved", 0, 3)], True, ""),
        ([attempt("cancelled", 0, 3)], False, "not requeued"),
        ([attempt("refused")], False, "refused again"),
        ([attempt("failed", 0, 4, step=6)], True, ""),
        ([attempt("failed", 0, 4, step=6), attempt("failed", 4, 4, step=6)], False, "step 7 failed twice"),
        ([attempt("failed", 0, 4, step=6), attempt("failed", 4, 8, step=9)], True, ""),
        (
            [attempt("failed", 0, 4, step=6), attempt("lost", 4, 4), attempt("failed", 4, 4, step=6)],
            False,
            "twice",
        ),
        ([attempt("failed", step=0), attempt("failed", step=0)], False, "step 1 failed twice"),
        ([attempt("unstarted")] * 3, True, ""),
        ([attempt("failed", step=0), attempt("unstarted")], True, ""),
        ([attempt("unstarted"), attempt("failed", step=0)], True, ""),
        ([attempt("lost")] * 3, True, ""),
        ([attempt("lost")] * 4, False, "4 attempts in a row without a new checkpoint (max_requeues=3)"),
        ([attempt("saved", 0, 2), *[attempt("lost", 2, 2)] * 3], True, ""),
        ([attempt("saved", i, i + 1) for i in range(50)], True, ""),
    ],
)
def test_a_job_is_requeued_as_long_as_the_run_makes_progress(attempts, requeue, why):
    decision = decide(attempts, max_requeues=3)
    assert decision.requeue is requeue
    assert why in decision.why


def test_no_sequence_of_bad_ends_is_requeued_for_ever():
    for end in ("saved", "failed", "unstarted", "lost"):
        attempts = [attempt(end)]
        while decide(attempts, max_requeues=5).requeue:
            attempts.append(attempt(end))
            assert len(attempts) <= 6


def test_history_survives_the_file_and_an_attempt_without_an_end_gets_one(tmp_path):
    path = tmp_path / "history.json"
    assert read_history(path) == History()
    running = Attempt("7", 0, 5.0, 0)
    write_history(path, History().begin(running))
    history = read_history(path).begin(Attempt("7", 1, 90.0, 2))
    assert [a.end for a in history.attempts] == ["lost", "running"]
    assert (history.attempts[0].ended, history.attempts[0].checkpoint_after) == (90.0, 2)
    done = replace(history.attempts[-1], end="finished")
    history = replace(history.end(done), stopped="enough")
    write_history(path, history)
    assert read_history(path) == history
    again = history.submitted_again()
    assert (again.stopped, again.attempts[again.counts_from :]) == (None, ())


def test_the_summary_says_steps_tokens_time_and_why():
    text = summary(attempt("saved", 2, 6))
    assert text == ("attempt 0 of job 7: steps 2 -> 6, 1,234 tokens, 1 min 0 s, checkpoint of step 6; saved: because")
    assert "no step after 0" in summary(attempt("failed"))


def test_srun_names_the_rank_that_failed_first():
    """Recorded from Slurm 22.05: with --kill-on-bad-exit all others are ended with 143."""
    said = (
        "srun: error: node2: task 2: Exited with exit code 2\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=2.1\n"
        "srun: error: node1: tasks 0-1: Terminated\n"
    )
    assert first_fault(said, 143) == (2, "node2: task 2: Exited with exit code 2")
    assert first_fault("srun: error: node1: task 1: Killed\n" + said, 143) == (143, "node1: task 1: Killed")
    assert first_fault("", 1) == (1, "")
    assert first_fault("", 0) == (0, "")


def test_what_squeue_scontrol_and_sacct_say_is_understood():
    """Recorded from Slurm 22.05 (sacct's from its manual)."""
    queue = parse_squeue(
        "41|PENDING|(Dependency)|4:00:00\n40|RUNNING|node[1-2]|3:59:09\n"
        "42|PENDING|(Resources)|10:00\n42|RUNNING|node3|9:30\n"
    )
    assert queue["40"] == JobState("40", "RUNNING", "node[1-2]", "3:59:09", "squeue")
    assert (queue["41"].state, queue["41"].time_left) == ("PENDING", "")
    assert queue["42"].state == "RUNNING"
    fields = parse_scontrol("JobId=1 JobName=x JobState=CANCELLED Reason=None NodeList=node[1-2] TRES=cpu=2,mem=512M\n")
    assert (fields["JobState"], fields["NodeList"], fields["TRES"]) == ("CANCELLED", "node[1-2]", "cpu=2,mem=512M")
    assert parse_sacct("9", "CANCELLED by 1000|node[1-2]\n") == JobState("9", "CANCELLED", "node[1-2]", "", "sacct")
    assert parse_sacct("9", "") is None
    over = {
        state: JobState("1", state).is_over for state in ("PENDING", "RUNNING", "COMPLETED", "NODE_FAIL", "UNKNOWN")
    }
    assert over == {"PENDING": False, "RUNNING": False, "COMPLETED": True, "NODE_FAIL": True, "UNKNOWN": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "answered"),
    [
        ("slurm_load_node error: Unable to contact slurm controller (connect failure)", False),
        ("srun: error: Unable to confirm allocation for job 41: Socket timed out on send/recv operation", False),
        ("Slurm backup controller in standby mode", False),
        ("srun: error: Unable to create step for job 41: Connection refused", False),
        ("srun: error: Task launch for StepId=41.0 failed on node node1: Communication connection failure", False),
        ("Zero Bytes were transmitted or received", False),
        ("Unexpected message received for job 1", False),
        ("Requested operation is presently disabled for job 41", True),
        ("Invalid job id specified", True),
        (
            "srun: error: Unable to create step for job 41: Required node not available (down, drained or reserved)",
            True,
        ),
        ("node1: no port is free from 15287 on\nsrun: error: node1: task 0: Exited with exit code 1", True),
    ],
)
def test_what_slurm_refuses_is_told_from_what_it_does_not_answer(tmp_path, monkeypatch, said, answered):
    """The first two, that of ``requeue`` and what is disabled are Slurm 22.05's; the others from its sources."""
    (tmp_path / "srun").write_text(f"#!/bin/sh\nprintf '%s' '{said}' >&2; exit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SlurmError) as error:
        slurm("srun")
    assert (str(error.value), isinstance(error.value, NoAnswerError)) == (said, not answered)


@pytest.mark.slow
def test_a_command_of_slurm_that_hangs_is_one_without_an_answer(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(NoAnswerError, match=r"`squeue` did not answer within 0.1 s"):
        slurm("squeue", timeout_s=0.1)


def test_one_status_tells_how_a_run_fares():
    step = {"step": 12, "reward/mean": 0.5, "tokens_per_second": 1000.0, "time/step": 2.0, "loss": 1.0}
    validation = {"step": 10, "validation/accuracy_greedy": 0.25}
    run = RunState(False, (step,), validation, 10, 125.0)
    jobs = [JobState("3", "COMPLETED"), JobState("4", "RUNNING", "node1", "1:00:00", "squeue")]
    text = "\n".join(describe(jobs, run, History((attempt("saved", 0, 4),))))
    for part in (
        "4 RUNNING node1, 1:00:00 left  (squeue)",
        "12, reward 0.500, 1,000 tokens/s",
        "0.250 greedy at step 10",
    ):
        assert part in text
    assert "step 10, 2 min 5 s ago" in text
    assert "steps 0 -> 4" in text
    assert run.tokens_after(11) == 2000
    assert run.tokens_after(12) == 0


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "NEMO_AAPO_TRAIN_ADDRESSES": "10.0.0.1,10.0.0.2",
    "NEMO_AAPO_SERVERS_ADDRESSES": "10.0.0.3,10.0.0.4",
    "MASTER_PORT": "29000",
}


def test_a_rank_gets_what_torchrun_would_set():
    environment = rank_environment(STEP, "train")
    assert environment["RANK"], environment["LOCAL_RANK"] == ("5", "1")
    assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("8", "4")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29000")
    assert environment["OMP_NUM_THREADS"] == "1"
    assert rank_environment({**STEP, "SLURM_CPUS_PER_TASK": "6"}, "train")["OMP_NUM_THREADS"] == "6"


def test_a_server_gets_its_nodes_address_its_place_in_an_array_and_its_share_of_the_gpus():
    words = ["-m", "server", "/runs/{task}/x", "host={address}", "--shard", "{task}"]
    filled = ["-m", "server", "/runs/{task}/x", "host=10.0.0.4", "--shard", "3"]
    assert fill_in(words, {**STEP, "SLURM_ARRAY_TASK_ID": "3"}, "servers") == filled
    of_four = {**STEP, PLACE: "1/4"}
    assert own_gpus({**of_four, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert own_gpus(of_four) == {}
