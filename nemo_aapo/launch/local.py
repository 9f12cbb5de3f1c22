"""All ranks of a job on this machine (Linux): started together, watched, and ended together.

The ranks get the variables that torchrun sets. Rank 0 writes to this terminal, the others to ``logs/rank_N.log``.
Each rank leads a session of its own, so that Ctrl-C in the terminal reaches it once, through here.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.config import Config, EvaluationConfig
from nemo_aapo.launch.slurm.rank import PORTS
from nemo_aapo.launch.slurm.rank import free_port as free_port_from
from nemo_aapo.utils.job import STARTED, start_of_process, world_size_of_job

POLL_S = 0.05
SHOWN_LINES = 20
_PR_SET_PDEATHSIG = 1


@dataclass
class Rank:
    """A started rank."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path | None
    """None: it writes to the terminal."""


def launch(config: Config, command: Sequence[str]) -> int:
    """Start ``trainer.devices`` ranks of ``command`` and wait for their end.

    Returns:
        0, or the exit code of the first rank that failed (128 + the signal's number where a signal ended it).
    """
    return run_ranks_of(config, command, Path(config.run.dir) / "logs")


def starts_ranks(count: int, num_nodes: int = 1) -> bool:
    """Whether this process starts the ranks instead of being one (torchrun, srun and this module set RANK)."""
    return "RANK" not in os.environ and num_nodes == 1 and count > 1


def world_size_of(config: Config | EvaluationConfig) -> int:
    """Ranks that will do the work: those that this process starts, or those of the job that it is one of."""
    count = config.trainer.devices
    return count if starts_ranks(count, config.trainer.num_nodes) else world_size_of_job()


def run_ranks_of(config: Config | EvaluationConfig, command: Sequence[str], log_dir: Path) -> int:
    """``run_ranks`` with as many ranks, and as much patience, as ``trainer`` of the configuration says."""
    return run_ranks(
        command,
        config.trainer.devices,
        log_dir,
        grace_s=config.trainer.distributed_timeout_s,  # no rank waits longer than this within a step
        fault_timeout_s=config.trainer.fault_timeout_s,
    )


def run_ranks(command: Sequence[str], count: int, log_dir: Path, *, grace_s: float, fault_timeout_s: float) -> int:
    """Start ``count`` ranks, forward SIGINT, SIGTERM and SIGUSR1 to them, and see all of them off.

    Args:
        grace_s: after a signal, or after the first rank has ended well, the rest has so long to end by itself.
        fault_timeout_s: the same after a rank has failed, or after a second SIGINT. The others may wait for it in
            collectives in vain: what has not ended by then is killed.

    Returns:
        As ``launch``.
    """
    received: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda signum, frame: received.append(signum)) for number in handled}
    ranks: list[Rank] = []
    try:
        environments = rank_environments(os.environ, count, free_port())
        for number, environment in enumerate(environments):
            ranks.append(_start(number, count, command, environment, log_dir))
        return _watch(ranks, received, grace_s, fault_timeout_s)
    finally:
        _kill(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def rank_environments(base: Mapping[str, str], count: int, port: int) -> list[dict[str, str]]:
    """The environment of each rank: what torchrun sets. Where ``OMP_NUM_THREADS`` is unset, ranks share the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    job = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",  # or the last words of a rank that is killed never reach its log
        STARTED: f"{start_of_process():.3f}",
        **base,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**job, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]


def free_port() -> int:
    """A TCP port that nobody listens on; not one of those that kernels hand out, as it is listened on later only."""
    return free_port_from(secrets.randbelow(PORTS))


def _start(number: int, count: int, command: Sequence[str], environment: dict[str, str], log_dir: Path) -> Rank:
    log, output = None, None
    if number > 0:
        log = log_dir / f"rank_{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")  # appended, as a resumed run goes on in the same directory
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        output.write(f"==== {now} rank {number} of {count}\n".encode())
        output.flush()
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_prepare_child(),
    )
    if output is not None:
        output.close()
    return Rank(number, process, log)


def _prepare_child() -> Callable[[], None]:
    """For the child between fork and exec."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's warning may come before Python has a handler
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel ends the rank when this process is gone
        if os.getppid() != parent:  # gone before the kernel was asked
            os._exit(1)

    return prepare


def _watch(ranks: Sequence[Rank], received: list[int], grace_s: float, fault_timeout_s: float) -> int:
    """Wait until all ranks have ended. What should lead to their end sets a deadline for it."""
    failed: Rank | None = None
    deadlines: dict[str, float] = {}  # since what -> until when
    while True:
        running = [rank for rank in ranks if not _has_ended(rank)]
        now = time.monotonic()
        if failed is None and (failed := _first_failure(ranks)):
            _report(failed, len(ranks))
            _send(running, signal.SIGTERM)
            deadlines[f"rank {failed.number} failed"] = now + fault_timeout_s
        if not running:
            return _exit_code(failed.process.returncode) if failed else 0
        if len(running) < len(ranks):
            deadlines.setdefault("another rank ended", now + grace_s)
        while received:
            number = received.pop(0)
            name = signal.Signals(number).name
            if number == signal.SIGINT and name in deadlines:
                deadlines.setdefault("the second SIGINT", now + fault_timeout_s)
            deadlines.setdefault(name, now + grace_s)
            _send(running, number)
        if deadlines and now > min(deadlines.values()):
            since = min(deadlines, key=lambda event: deadlines[event])
            _say(f"rank {', '.join(str(rank.number) for rank in running)}: did not end in time after {since}; killed")
            failed = failed or running[0]
            _kill(running)
        time.sleep(POLL_S)


def _has_ended(rank: Rank) -> bool:
    """Whether the rank is gone; what it started and left behind goes with it."""
    if rank.process.returncode is not None:
        return True
    if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    os.killpg(rank.process.pid, signal.SIGKILL)  # before the process is reaped, so that its number is still its own
    rank.process.wait()
    return True


def _first_failure(ranks: Sequence[Rank]) -> Rank | None:
    """A rank that a signal ended comes before one that ended by itself, perhaps as it missed the other."""
    failed = [rank for rank in ranks if rank.process.returncode]
    return min(failed, key=lambda rank: rank.process.returncode > 0, default=None)


def _report(rank: Rank, count: int) -> None:
    code = rank.process.returncode
    how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    if rank.log is None:
        _say(f"rank {rank.number} of {count} {how}; what it said is above")
        return
    lines = rank.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    _say(f"rank {rank.number} of {count} {how}; the end of {rank.log}:\n" + "\n".join(f"  {line}" for line in lines))


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _send(ranks: Sequence[Rank], number: int) -> None:
    """To the ranks themselves; their workers are theirs to end."""
    for rank in ranks:
        rank.process.send_signal(number)


def _kill(ranks: Sequence[Rank]) -> None:
    """Ranks that still run, with all that they started."""
    for rank in ranks:
        if not _has_ended(rank):
            os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
