"""What a job's script becomes: starts the roles, hears Slurm's signals, and decides what follows their end.

    supervisor job|interactive|task --fault-timeout S [--max-requeues N] [--servers N --min-servers N] RUN_DIR
               :: train srun ... [:: servers srun ...]

job: a batch job that trains; interactive: the same in an allocation, without history and requeue, and its ranks' logs
are shown; task: anything else, which leaves the run's state alone.

USR1 (time limit, preemption, ``scancel --batch --signal=USR1``): a stop file in the run directory makes the trainer
finish its step, save and end with 0; then the job is requeued. A file rather than a signal: ranks that are still
importing would not survive one. TERM (``scancel``): the same, but the job never comes back.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from nemo_aapo.errors import FAILED, INTERRUPTED, REFUSED, ConfigError, NoAnswerError, RunError, SlurmError, one_line
from nemo_aapo.launch.slurm.attempts import Attempt, End, decide, read_history, summary, write_history
from nemo_aapo.launch.slurm.commands import node_addresses, parse_scontrol, slurm
from nemo_aapo.launch.slurm.logs import Tail
from nemo_aapo.launch.slurm.paths import RunPaths
from nemo_aapo.launch.slurm.rank import ADDRESSES, free_port
from nemo_aapo.launch.slurm.roles import Ended, Roles, Signals, Step, server_steps
from nemo_aapo.launch.slurm.script import SERVERS, split_roles
from nemo_aapo.run.state import read_state
from nemo_aapo.run.stop import STOP_FILE
from nemo_aapo.utils.files import LOCK
from nemo_aapo.utils.job import STARTED, start_of_job, start_of_process

T = TypeVar("T")
LOCK_WAIT_S = 120.0
"""Ranks of an attempt whose node was lost may live on for a while, and hold the run directory."""
SEEN_WAIT_S = 15
"""A shared file system may take so long to show a new file on all nodes."""
SLURM_WAIT_S = 600.0
"""Slurm's controller may be away for a while, as for a restart: what it does not answer is asked again for so long."""
SLURM_PAUSE_S = 15.0
REQUEUE_WAIT_S = 120.0
"""Slurm ends the script of a job that it requeues within this."""
CANCELLED, LOST = "cancelled", "requeued by Slurm"
"""What TERM can stand for."""


class Supervisor:
    """One start of a job."""

    def __init__(
        self,
        paths: RunPaths,
        commands: Mapping[str, Sequence[str]],
        *,
        fault_timeout_s: float,
        servers: int = 0,
        min_servers: int = 0,
    ) -> None:
        """
        Args:
            commands: role -> ``srun`` and all its words, the trainer first; that of the servers is one server's.
            servers: how many rollout servers there are.
            min_servers: the attempt ends when it can't have so many any more.
        """
        self.paths, self.commands, self.fault_timeout_s = paths, commands, fault_timeout_s
        self.servers, self.min_servers = servers, min_servers
        self.job, self.restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.asked: str | None = None
        """What asked the trainer to stop: USR1, INT, or what TERM stood for."""
        self.signals = Signals()

    def run_training(self, *, follow: bool = False) -> Ended:
        """Start trainer and servers and see them off.

        Args:
            follow: show what they write.

        Raises:
            ConfigError: a node does not see the run directory.
            RunError: another process still uses it, no port is free, or Slurm does not answer.
        """
        (self.paths.run_dir / STOP_FILE).unlink(missing_ok=True)
        for address in self.paths.servers.glob("server_*.json"):  # of servers that are gone
            address.unlink()
        self._see_run_directory_everywhere()
        wait_for_lock(self.paths.run_dir / LOCK, LOCK_WAIT_S)
        tail = Tail(self.paths.logs, from_end=True) if follow else None

        def each() -> None:
            self._hear()
            for line in tail.lines() if tail else ():
                print(line, flush=True)

        try:
            ended = self.run(each)
            each()  # a signal that came at the very end still decides whether the job comes back
        finally:
            (self.paths.run_dir / STOP_FILE).unlink(missing_ok=True)
        return ended

    def run(self, each: Callable[[], None]) -> Ended:
        """Start all roles and see them off; ``each`` is called several times a second."""
        (train, *_), logs = self.commands, self.paths.logs
        environment = self._environment()
        servers = []
        if SERVERS in self.commands:
            addresses = environment[ADDRESSES.format(role=SERVERS.upper())].split(",")
            servers = server_steps(self.commands[SERVERS], addresses, self.servers, environment, logs)
        step = Step(train, self.commands[train], environment, "rank_%t.log")
        return Roles(step, servers, logs, min_servers=self.min_servers, fault_timeout_s=self.fault_timeout_s).wait(each)

    def attempt(self, max_requeues: int) -> int:
        """Run as a batch job: keep the history, sum up, requeue. Returns the exit code unless it is requeued."""
        history = read_history(self.paths.history)
        state = read_state(self.paths.run_dir)
        if state.finished:
            say("the run is finished: nothing to do")
            return 0
        if history.stopped:
            say(f"nothing is started: {history.stopped}")
            return FAILED
        attempt = Attempt(self.job, self.restart, time.time(), state.checkpoint)
        history = history.begin(attempt)
        write_history(self.paths.history, history)
        say(f"attempt {self.restart} of job {self.job} begins after step {state.checkpoint}")
        end, why = self._end_of_training()
        attempt = attempt.closed(end, why, read_state(self.paths.run_dir))
        history = history.end(attempt)
        decision = decide(history.attempts[history.counts_from :], max_requeues)
        if end not in ("finished", "cancelled") and not decision.requeue:
            history = replace(history, stopped=decision.why)
        write_history(self.paths.history, history)
        say(summary(attempt))
        if decision.requeue and end != "lost":  # then Slurm does it
            self._requeue()
        else:
            say(decision.why)
        return {"finished": 0, "cancelled": 0, "refused": REFUSED}.get(end, FAILED)

    def _end_of_training(self) -> tuple[End, str]:
        """How it ends, and why."""
        try:
            ended = self.run_training()
        except ConfigError as error:
            return "refused", str(error)
        except RunError as error:  # nothing was started
            if signal.SIGTERM in self.signals.received:  # which broke off the waiting
                self.asked = self._why_term()
            end, why = self._judge(Ended(FAILED, one_line(error), "", str(error)))
            return ("unstarted" if end == "failed" else end), why
        end, why = self._judge(ended)
        if end in ("failed", "lost"):
            say(ended.last_words)
        return end, why

    def _judge(self, ended: Ended) -> tuple[End, str]:
        """How the trainer's end is to be understood."""
        if read_state(self.paths.run_dir).finished:
            return "finished", "the run is complete"
        if self.asked == CANCELLED:
            return "cancelled", "SIGTERM from Slurm (scancel, or the time limit before the trainer could save)"
        if self.asked == LOST or "ode failure" in ended.last_words:  # srun's words for a node that Slurm gave up
            return "lost", ended.fault or "Slurm ended the job and requeued it: a lost node, or no time to save"
        if ended.lost_servers:
            return "failed", ended.lost_servers
        if ended.code == 0:
            return "saved", f"{self.asked or 'the trainer was asked to stop, or checkpoint.max_time_s was reached'}"
        if ended.code == REFUSED:
            return "refused", f"the trainer refused its configuration; see {self.paths.logs / 'rank_0.log'}"
        return "failed", ended.fault or f"exit code {ended.code}"

    def _hear(self) -> None:
        """Act on signals that came."""
        while self.signals.received:
            number = self.signals.received.pop(0)
            reason = self._why_term() if number == signal.SIGTERM else signal.Signals(number).name
            if number == signal.SIGINT and self.asked is not None:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait for the end of the step
            if self.asked is None or reason in (CANCELLED, LOST):
                self.asked = reason
                say(f"{reason}: asking the trainer to finish its step, save and end")
        if self.asked is not None:  # again and again: a trainer that is just starting removes an old stop file
            (self.paths.run_dir / STOP_FILE).touch()

    def _why_term(self) -> str:
        """TERM comes with ``scancel`` and at the time limit, but also when Slurm takes a job back: a node was lost, or
        the time that preemption leaves is over."""
        try:
            fields = parse_scontrol(slurm("scontrol", "show", "job", "-o", self.job))
        except SlurmError:
            return CANCELLED
        return LOST if int(fields.get("Restarts", "0")) > self.restart else CANCELLED  # its state is the same in both

    def _requeue(self) -> None:
        """Put this very job back into the queue. Slurm ends this script, so this returns only if that failed."""
        try:
            self._answered(partial(slurm, "scontrol", "requeue", self.job))
        except SlurmError as error:
            if signal.SIGTERM not in self.signals.received or self._why_term() == CANCELLED:  # else it was heard
                say(f"not requeued: {one_line(error)}. `scripts/launch.py requeue` submits the run again")
                return
        say("requeued")
        time.sleep(REQUEUE_WAIT_S)  # the signals by which Slurm ends this script are kept, and change nothing

    def _answered(self, ask: Callable[[], T]) -> T:
        """What Slurm answers; it is asked again while it does not.

        Raises:
            NoAnswerError: none within ``SLURM_WAIT_S``, or before a signal that ends the job.
            SlurmError: the answer is a refusal, which another call would not change.
        """
        deadline = time.monotonic() + SLURM_WAIT_S
        while True:
            try:
                return ask()
            except NoAnswerError as error:
                if time.monotonic() > deadline or self.signals.wait(SLURM_PAUSE_S, signal.SIGTERM, signal.SIGINT):
                    raise
                say(f"asking Slurm again: {one_line(error)}")

    @cached_property
    def _addresses(self) -> list[list[str]]:
        """Of each role's nodes."""
        groups = range(len(self.commands)) if len(self.commands) > 1 else [None]
        return [self._answered(partial(node_addresses, os.environ, group)) for group in groups]

    def _environment(self) -> dict[str, str]:
        """Of ``srun``, which hands it on: where the nodes of each role are reached."""
        names = [ADDRESSES.format(role=role.upper()) for role in self.commands]
        addresses = dict(zip(names, map(",".join, self._addresses), strict=True))
        return {**os.environ, **addresses, "MASTER_PORT": str(self._answered(self._free_port))}

    def _free_port(self) -> int:
        """A port that is free on the first node, where rank 0 will listen on it.

        Raises:
            RunError: none was found.
        """
        start = int(self.job) * 7 + self.restart  # jobs that share a node look in different places
        node = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
        if os.environ.get("SLURMD_NODENAME") == node:
            return free_port(start)
        flags = ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={node}", "--chdir=/", "--input=none")
        said = slurm("srun", *flags, sys.executable, "-m", "nemo_aapo.launch.slurm.rank", "port", str(start))
        return int(said.split()[-1])

    def _see_run_directory_everywhere(self) -> None:
        """A run directory on a local disk looks well until the other nodes begin to write."""
        mark = self.paths.folder / f"seen_by_{self.job}"
        mark.touch()
        look_for = f'for _ in {{1..{SEEN_WAIT_S}}}; do [[ -e $1 ]] && exit; sleep 1; done; echo "$SLURMD_NODENAME"'
        try:
            blind = []
            for group, nodes in enumerate(self._addresses):
                flags = [f"--het-group={group}"] if len(self.commands) > 1 else []
                flags += [f"--nodes={len(nodes)}", "--ntasks-per-node=1", "--chdir=/", "--input=none"]
                look = partial(slurm, "srun", *flags, "bash", "-c", look_for, "bash", str(mark))
                blind += self._answered(look).split()
        finally:
            mark.unlink(missing_ok=True)
        if blind:
            raise ConfigError(
                f"run.dir={self.paths.run_dir}: {', '.join(sorted(blind))} can't see it. Put it on a file system that "
                "all nodes share (run.dir=DIR)"
            )


def wait_for_lock(path: Path, seconds: float) -> None:
    """Until no other process holds the run directory.

    Raises:
        RunError: still held after so many seconds.
    """
    if not path.exists():
        return
    deadline = time.monotonic() + seconds
    with path.open("r+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"{path.parent} is still in use by {file.read().strip()}") from None
                time.sleep(0.5)
            except OSError:  # some cluster file systems are mounted without locks
                return


def main(argv: Sequence[str]) -> int:
    """The exit code of the job."""
    options, commands = split_roles(argv)
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("mode", choices=["job", "interactive", "task"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max-requeues", type=int, default=0)
    parser.add_argument("--fault-timeout", type=float, required=True)
    parser.add_argument("--servers", type=int, default=0)
    parser.add_argument("--min-servers", type=int, default=0)
    given = parser.parse_args(options)
    started = start_of_process() if given.mode == "interactive" else start_of_job()
    os.environ[STARTED] = f"{started:.3f}"  # the ranks' time limit counts from there
    os.environ["SLURM_EXPORT_ENV"] = "ALL"  # after `sbatch --export=NONE`, srun would hold back what is here
    supervisor = Supervisor(
        RunPaths(given.run_dir),
        commands,
        fault_timeout_s=given.fault_timeout,
        servers=given.servers,
        min_servers=given.min_servers,
    )
    try:
        if given.mode == "job":
            return supervisor.attempt(given.max_requeues)
        ended = supervisor.run_training(follow=True) if given.mode == "interactive" else supervisor.run(lambda: None)
    except (ConfigError, RunError) as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    if ended.code:
        say("\n".join(filter(None, [ended.lost_servers, ended.last_words])))
    return ended.code


def say(text: str) -> None:
    """Into the job's log."""
    print(f"[{datetime.now().isoformat(timespec='seconds')}] {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
