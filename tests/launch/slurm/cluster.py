"""A real Slurm of the test's own, and runs on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.launch.slurm.attempts import Attempt, read_history
from nemo_aapo.launch.slurm.commands import parse_scontrol
from nemo_aapo.launch.slurm.paths import RunPaths
from tests.training_runs import exported, metrics, settings

ROOT = Path(__file__).resolve().parents[3]
START_SLURM = Path(__file__).with_name("start_slurm.sh")
REWARD = Path(__file__).with_name("rewards.py")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if not absent:
        return ""
    script = START_SLURM.relative_to(ROOT)
    return f"no {', '.join(absent)}: bash {script} install (Debian, as root), or see docs/guide/slurm.md"


class Cluster:
    """Daemons in one directory; every command gets an environment of its own."""

    def __init__(self, folder: Path, *, nodes: int = 6, warn_preempted: bool = True) -> None:
        """Start it. It ends with this process, however that ends."""
        self.folder = folder
        port = 30000 + os.getpid() % 120 * 20 + (0 if warn_preempted else 10)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))},
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SLURM_TEST_NODES": str(nodes),
            "SLURM_TEST_PORT": str(port),
            "SLURM_TEST_NODE_TIMEOUT": "10",
            "SLURM_TEST_WARN_PREEMPTED": "true" if warn_preempted else "false",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MUNGE_SOCKET": str(folder / "munge" / "munge.socket"),
        }
        guard = ["bash", START_SLURM, "guard", folder, str(os.getpid())]
        subprocess.Popen(guard, env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL)
        self.manage("start")

    def manage(self, action: str, *words: str) -> None:
        """``start_slurm.sh``."""
        command = ["bash", START_SLURM, action, self.folder, *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr

    def run(self, *words: str, timeout: float = 300, check: bool = True, **variables: str) -> str:
        """A command's output."""
        done = subprocess.run(
            words,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.folder,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def launch(self, *words: str, inside: Sequence[str] = (), check: bool = True, timeout: float = 300) -> str:
        """``scripts/launch.py``; inside of another command, as ``salloc``, if one is given."""
        launch = (sys.executable, str(ROOT / "scripts" / "launch.py"))
        return self.run(*inside, *launch, *words, check=check, timeout=timeout)

    def job(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        return parse_scontrol(self.run("scontrol", "show", "job", "-o", job))

    def node_names(self, job: str) -> list[str]:
        """The nodes of a running job."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()


@dataclass
class Run:
    """A run that was submitted, or is about to be."""

    cluster: Cluster
    directory: Path
    words: list[str]
    job: str = ""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.directory)

    def submit(self, *more: str, inside: Sequence[str] = ()) -> list[str]:
        """Submit it; the ids."""
        said = self.cluster.launch(*self.words, *more, inside=inside)
        return re.search(r"^submitted ([\d, ]+):", said, re.MULTILINE)[1].split(", ")

    def say(self, action: str, *words: str, check: bool = True) -> str:
        """``launch.py status`` and the like."""
        return self.cluster.launch(action, f"run.dir={self.directory}", *words, check=check)

    def attempts(self) -> tuple[Attempt, ...]:
        """What the run's history says."""
        return read_history(self.paths.history).attempts

    def log(self) -> str:
        """What the jobs' scripts said."""
        return "".join(path.read_text() for path in sorted(self.paths.logs.glob("slurm_*.log")))

    def wait_until_held(self, attempt: int) -> None:
        """Until the reward holds this attempt up."""
        wait_for(lambda: len(self.attempts()) > attempt, f"attempt {attempt} of {self.directory}", self.log)
        wait_for((self.directory / "held").exists, f"held attempt {attempt} of {self.directory}", self.log)
        (self.directory / "held").unlink()

    def wait_until(self, job: str, *states: str, seconds: float = 600) -> None:
        """Until the job is in one of these states."""
        wait_for(
            lambda: self.cluster.job(job)["JobState"] in states,
            f"job {job} {states} of {self.directory}",
            lambda: f"{self.cluster.job(job)} {self.log()}",
            seconds,
        )

    def ranks(self, job: str, what: str = "train") -> dict[int, int]:
        """Rank -> process id, of what runs now, of a kind."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_text().split("\0")
                command = (process / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if f"SLURM_JOB_ID={job}" in variables and command[1:4] == ["-m", "nemo_aapo.cli", what]:
                rank = next(v.partition("=")[2] for v in variables if v.startswith("RANK="))
                found[int(rank)] = int(process.name)
        return found


def make_run(cluster: Cluster, given: Path, name: str, *more: str, held: int = 0) -> Run:
    """A tiny run of three steps, on two nodes with a rank each, under TP2, unless told otherwise.

    Args:
        given: model and data, by ``training_runs.make_input``.
        held: so many attempts are held up until they are asked to stop.
    """
    directory = given / name
    words = settings(
        given,
        directory,
        "trainer.num_nodes=2",
        "trainer.distributed_timeout_s=660",
        "trainer.fault_timeout_s=3",
        f'rewards=[{{name: custom, function: "{REWARD}:custom"}}]',
        "validation.reward=custom",
        "validation.samples=1",
        "trainer.max_steps=3",
        "checkpoint.save_interval=100",
        "checkpoint.keep_last=9",
        "reward_runner.timeout_s=650",
        "cluster=slurm",
        "cluster.gpus_per_node=1",
        'cluster.time="00:20:00"',
        "cluster.signal_s=10",
        tp=2,
    )
    hold = [f"+cluster.env.HELD_ATTEMPTS={held}", f"+cluster.env.HOLD_UNTIL={directory}/stop"] if held else []
    return Run(cluster, directory, [*words, *hold, *more])


def wait_for(condition: Callable[[], Any], what: str, story: Callable[[], str], seconds: float = 600) -> None:
    """Poll; fails with the story."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s: {story()}"
        time.sleep(0.3)


def jobs_of(run: Run) -> list[dict[str, Any]]:
    """What the run remembers of its jobs."""
    return json.loads(run.paths.jobs.read_text())


def assert_equal(run: Run, expected: Run) -> None:
    """Metrics but times, and weights to the bit."""
    assert metrics(run.directory) == metrics(expected.directory)
    assert exported(run.directory) == exported(expected.directory)
