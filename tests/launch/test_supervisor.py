"""The supervisor where Slurm's commands fail for a while, or for good: scripts in their place, and in the trainer's."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from nemo_aapo.errors import FAILED, REFUSED
from nemo_aapo.launch.slurm.attempts import History, read_history
from nemo_aapo.launch.slurm.paths import RunPaths
from nemo_aapo.utils.files import LOCK

pytestmark = pytest.mark.slow

SCONTROL = """
count=$(($(cat "$FAKE/$1" 2>/dev/null || echo 0) + 1)); echo "$count" >"$FAKE/$1"  # calls of `show`, of `requeue`
if ((count <= ${AWAY[$1]:-0})); then echo "Unable to contact slurm controller" >&2; exit 1; fi
[[ $1 != "$REFUSED" ]] || { echo "Requested operation is presently disabled for job 41" >&2; exit 1; }
case "$1 $2" in "show hostnames") echo node1 ;; "show node") echo "NodeName=node1 NodeAddr=127.0.0.1" ;; esac
"""
SRUN = """
while [[ $1 == --* ]]; do shift; done  # its flags
echo "$@" >>"$FAKE/srun_calls"
[[ $1 != bash || -z $BLIND ]] || { echo node1; exit; }
[[ $* != *" port "* ]] || { echo "node1: no port is free from 15287 on, 100 were tried" >&2; exit 1; }
exec "$@"
"""
SUPERVISOR = """
import sys
from nemo_aapo.launch.slurm import supervisor
supervisor.SLURM_WAIT_S, supervisor.SLURM_PAUSE_S, supervisor.REQUEUE_WAIT_S = {wait}, 0.05, 0.1
supervisor.LOCK_WAIT_S = 0.1
sys.exit(supervisor.main(sys.argv[1:]))
"""


def start(
    folder: Path, *, away: Mapping[str, int], wait_s: float = 0.3, trainer: str = "true", **more: str
) -> subprocess.Popen[str]:
    """A job's script: the first calls of ``scontrol show`` and ``requeue`` fail, as many as ``away`` says of each.

    Args:
        more: of its environment. BLIND: the node does not see the run directory; REFUSED: what scontrol refuses.
    """
    paths = RunPaths(folder / "run")
    paths.make()
    failing = "declare -A AWAY=(" + " ".join(f"[{what}]={times}" for what, times in away.items()) + ")"
    for name, body in {"scontrol": failing + SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder), "BLIND": ""}
    environment |= {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node1", "SLURMD_NODENAME": "node1", **more}
    words = ["job", "--fault-timeout=1", "--max-requeues=2", str(paths.run_dir), "::", "train", "srun", "--nodes=1"]
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR.format(wait=wait_s), *words, "sh", "-c", trainer],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def see_off(job: subprocess.Popen[str], folder: Path) -> tuple[int, list[str], History]:
    """Exit code, what it said without the times, and the run's history."""
    said = job.communicate(timeout=60)[0]
    return (
        job.returncode,
        re.findall(r"^\[\S+\] (.*)", said, re.MULTILINE),
        read_history(folder / "run/slurm/history.json"),
    )


AGAIN = "asking Slurm again: Unable to contact slurm controller"


def test_a_controller_that_is_away_for_a_while_ends_no_attempt(tmp_path):
    job = start(tmp_path, away={"show": 5}, wait_s=60, trainer=f"touch {tmp_path}/run/finished")
    code, said, history = see_off(job, tmp_path)
    assert (code, said.count(AGAIN), said[-1]) == (0, 5, "the run is complete")
    assert [attempt.end for attempt in history.attempts] == ["finished"]


def test_a_controller_that_stays_away_twice_gives_up_neither_the_run_nor_its_chain(tmp_path):
    for attempts in (1, 2):
        code, said, history = see_off(start(tmp_path, away={"show": 999, "requeue": 999}), tmp_path)
        assert code == FAILED
        ends = [(attempt.end, attempt.why) for attempt in history.attempts]
        assert ends == attempts * [("unstarted", "Unable to contact slurm controller")]
        assert history.stopped is None
        assert said[-1].startswith("not requeued: Unable to contact slurm controller. `scripts/launch.py requeue`")
        assert "requeued" not in said
    code, _, history = see_off(start(tmp_path, away={}, trainer=f"touch {tmp_path}/run/finished"), tmp_path)
    assert (code, history.attempts[-1].end) == (0, "finished")


def test_a_run_directory_that_stays_in_use_twice_does_not_give_up_the_run(tmp_path):
    paths = RunPaths(tmp_path / "run")
    paths.make()
    with (paths.run_dir / LOCK).open("w") as lock:
        lock.write("process 9 on node7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for attempts in (1, 2):
            _, said, history = see_off(start(tmp_path, away={}), tmp_path)
            ends = [(attempt.end, attempt.why) for attempt in history.attempts]
            assert ends == attempts * [("unstarted", f"{paths.run_dir} is still in use by process 9 on node7")]
            assert (history.stopped, said[-1]) == (None, "requeued")


def test_a_requeue_is_asked_for_until_slurm_answers_and_called_done_only_then(tmp_path):
    _, said, history = see_off(start(tmp_path, away={"requeue": 2}, wait_s=60), tmp_path)
    assert said[-3:] == [AGAIN, AGAIN, "requeued"]
    assert (history.attempts[-1].end, history.stopped) == ("saved", None)
    assert (tmp_path / "requeue").read_text() == "3\n"


@pytest.mark.parametrize(
    ("more", "calls", "said"),
    [
        ({"REFUSED": "requeue"}, "requeue", "Requested operation is presently disabled"),
        ({"REFUSED": "show"}, "show", "Requested operation is presently disabled"),
        ({"SLURMD_NODENAME": "node2"}, "srun_calls", "no port is free"),  # so that the first node is asked by srun
    ],
)
def test_what_slurm_refuses_is_asked_once(tmp_path, more, calls, said):
    code, lines, _ = see_off(start(tmp_path, away={}, wait_s=60, **more), tmp_path)
    assert code == FAILED
    assert said in "".join(lines)
    assert not any("asking Slurm again" in line for line in lines)
    asked = (tmp_path / calls).read_text().splitlines()
    assert len([line for line in asked if "bash -c" not in line]) == 1  # but for the look at the run directory


@pytest.mark.parametrize("away", ["show", "requeue"])
def test_a_job_that_is_cancelled_while_slurm_does_not_answer_ends_at_once(tmp_path, away):
    job = start(tmp_path, away={away: 999}, wait_s=600)
    heard = next(line for line in job.stdout if AGAIN in line)
    job.send_signal(signal.SIGTERM)
    code, said, history = see_off(job, tmp_path)
    assert heard
    assert history.stopped is None
    if away == "show":
        assert (code, history.attempts[-1].end) == (0, "cancelled")
    else:
        assert said[-1].startswith("not requeued: ")


def test_only_a_node_that_does_not_see_the_run_directory_stops_the_run_for_good(tmp_path):
    code, said, history = see_off(start(tmp_path, away={}, BLIND="yes"), tmp_path)
    assert (code, history.attempts[-1].end) == (REFUSED, "refused")
    assert "node1 can't see it" in history.attempts[-1].why
    assert history.stopped == said[-1] == "the run stops: it would be refused again"
