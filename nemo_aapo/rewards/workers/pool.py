"""A pool of worker processes, each killed and replaced when a request takes too long or crashes it.

Workers are started afresh and not forked, as the trainer has torch's and gloo's threads. Requests are numbered, and a
reply repeats the number: whatever else a worker says is an error of the item at hand, and never the next one's reply.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from nemo_aapo.errors import RewardError
from nemo_aapo.rewards.workers.channel import Channel
from nemo_aapo.rewards.workers.output import LastWords
from nemo_aapo.trace import spans

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Importing sympy takes a second, or a minute from the cold network disk of a large cluster."""
_REAP_TIMEOUT_S = 10.0

Failure = Literal["timeout", "error"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request."""

    parts: list[float | None]
    """The values that were asked for, None for one that could not be had; empty if the request failed."""
    detail: str = ""
    """What went wrong, in one line; empty if nothing did."""
    failure: Failure | None = None
    """Why nothing came of the request."""


class WorkerPool:
    """Answers requests in ``workers`` processes, first come first served."""

    def __init__(self, setup: dict[str, Any], workers: int, timeout_s: float) -> None:
        """Start all workers and wait until they are ready.

        Args:
            setup: the first message to each worker (see ``nemo_aapo.rewards.workers.worker``).
            workers: processes, at least 1.
            timeout_s: seconds of wall clock from handing over a request to its reply.

        Raises:
            RewardError: a worker can't load its rewards, or isn't ready in time.
        """
        self._setup = {**setup, "timeout_s": timeout_s, "start_timeout_s": START_TIMEOUT_S}
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], Future[Reply]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        try:
            started = [self._start() for _ in range(workers)]
            for worker in started:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise
        for number, worker in enumerate(started):
            # One thread a worker, which does nothing but wait for it. Daemons, as an exit must not wait for them.
            thread = threading.Thread(target=self._serve, args=(number, worker), name="reward-worker", daemon=True)
            self._threads.append(thread)
            thread.start()
        logger.info("%d reward worker(s) ready, process ids %s", workers, self.pids)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are there now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers if worker.process.returncode is None]

    def request(self, message: dict[str, Any]) -> Future[Reply]:
        """The reply to come. Raises RewardError if the pool is closed."""
        if self._closed:
            raise RewardError("the reward workers are closed")
        future: Future[Reply] = Future()
        self._jobs.put((message, future))
        return future

    def close(self) -> None:
        """Kill all workers; requests that no worker has taken yet are cancelled."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[1].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for worker in workers:
            worker.kill()

    def _serve(self, number: int, worker: _Worker) -> None:
        while (job := self._jobs.get()) is not None:
            message, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = self._alive(worker)
                start = time.perf_counter_ns()
                reply = worker.ask(message, self._timeout_s)
                if (recorder := spans.recorder) is not None:
                    _record(recorder, f"worker {number}", start, reply, self._jobs.qsize())
                future.set_result(reply)
                worker = self._alive(worker)  # now, and not when the next request waits for it
            except Exception as error:  # for whoever waits, as no one looks at this thread
                if not future.done():  # else the next request meets it, if it lasts
                    future.set_exception(error)

    def _alive(self, worker: _Worker) -> _Worker:
        """The worker, or another one in its place if it has died."""
        if worker.process.poll() is None:
            return worker
        worker.kill()  # it may have died by itself, its channel still open
        worker = self._start()
        worker.wait_ready()
        return worker

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RewardError("the reward workers are closed")
            self._workers = [worker for worker in self._workers if worker.process.poll() is None]
            self._workers.append(_Worker(self._setup))
            return self._workers[-1]


def _record(recorder: spans.Recorder, worker: str, start: int, reply: Reply, waiting: int) -> None:
    """A score for a trace, and how many are still to be made."""
    process, name = f"reward workers of {recorder.process}", f"score: {reply.failure}" if reply.failure else "score"
    recorder.add(name, start, time.perf_counter_ns(), "score", process=process, track=worker)
    recorder.sample("queue", process=process, waiting=waiting)


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        here, there = socket.socketpair()
        self._said = LastWords()
        # The same import path as this process, so that a custom reward is found wherever the trainer would find it.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nemo_aapo.rewards.workers.worker"],
                stdin=there.fileno(),
                stdout=self._said.writer,  # what a reward prints goes to the log
                stderr=self._said.writer,
                # The fixed hash seed: reasoning-gym makes the item that an answer belongs to anew (data.gym_items).
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                start_new_session=True,  # so that a kill takes what a reward started along, and Ctrl-C leaves it alone
            )
        except OSError as error:
            here.close()
            self._said.end()
            raise RewardError(f"a reward worker can't be started: {error}") from error
        finally:
            there.close()
            self._said.close_writer()
        self._channel = Channel(here)
        self._setup = setup
        self._requests = 0

    def wait_ready(self) -> None:
        """Raises RewardError, the worker killed, if it does not come up."""
        try:
            self._channel.send(self._setup, START_TIMEOUT_S)
            answer = self._channel.receive(START_TIMEOUT_S)
        except TimeoutError:
            self.kill()
            how = f"a reward worker was not ready after {START_TIMEOUT_S:.0f} s"
            raise RewardError("; ".join((how, *self._last_words()))) from None
        except (EOFError, OSError, ValueError) as error:
            how = f"a reward worker died at its start ({self.kill()})"
            raise RewardError("; ".join((how, *self._last_words()))) from error
        if answer != {"ready": True}:
            self.kill()
            raise RewardError(f"a reward worker can't load its rewards: {answer.get('error', answer)}")

    def ask(self, message: dict[str, Any], timeout_s: float) -> Reply:
        """The reply. The worker is dead afterwards if it took too long, crashed, or said anything else."""
        start = time.monotonic()
        self._requests += 1
        try:
            self._channel.send({**message, "number": self._requests}, timeout_s)
            answer = self._channel.receive(start + timeout_s - time.monotonic())
        except TimeoutError:
            self.kill()
            return self._lost(f"took longer than {timeout_s:g} s; the worker was killed", "timeout")
        except (EOFError, OSError):
            return self._lost(f"the worker died: {self.kill()}")
        except (ValueError, RecursionError) as error:
            self.kill()
            return self._lost(f"the worker sent what is no reply, and was killed: {error}")
        if answer.get("number") != self._requests:
            self.kill()
            return self._lost("the worker sent another item's reply, and was killed")
        if "error" in answer:
            return Reply([], answer["error"], "error")
        return Reply(answer["parts"], answer["detail"])

    def _lost(self, how: str, failure: Failure = "error") -> Reply:
        """What came of a request that the worker did not survive."""
        return Reply([], "; ".join((how, *self._last_words())), failure)

    def _last_words(self) -> list[str]:
        return [f"it wrote last: {said}"] if (said := self._said.end()) else []

    def kill(self) -> str:
        """End the process and all that it started; says how it ended. May be called again."""
        if self.process.returncode is None:
            # Before it is reaped: until then its process group's number can't belong to anyone else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it dies when it comes back
                self.process.wait(_REAP_TIMEOUT_S)
        self._channel.close()
        code = self.process.returncode
        self._said.end()
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
