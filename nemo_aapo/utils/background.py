"""One job at a time in a thread beside the main one, which gets the error that the job ends in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from nemo_aapo.errors import RunError, first_line

logger = logging.getLogger(__name__)

CLOSE_S = 60.0
"""Seconds that a process which ends in an error waits for its job."""
BEST_EFFORT_S = 300.0
"""Seconds that a job which may fail keeps whoever waits for it: disks of clusters can hang for ever, and other ranks
are waiting meanwhile, which ``trainer.distributed_timeout_s`` bounds."""


class Background:
    """Runs a job in a thread. The thread is a daemon: a job that never ends can't keep the process alive."""

    def __init__(self, name: str = "checkpoint") -> None:
        """Args: name: of the thread."""
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job; the one before has been waited for."""
        if self._thread is not None:
            raise RuntimeError("a job is under way: wait for it first")

        def run() -> None:
            try:
                job()
            except BaseException as error:  # raised again in the main thread, by ``wait``
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def failed(self) -> bool:
        """True once the job has ended in an error, until ``wait`` raises it."""
        return self._error is not None

    def busy(self) -> bool:
        """True while a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        """Return when no job is under way.

        Raises:
            RunError: it is still under way after so many seconds.
            Exception: whatever the job ended in.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self.busy():
            raise RunError(f"{self._name}: not written within {timeout_s:g} s; does the disk still answer?")
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Give a job that is under way the time to end, as another error is on its way out already."""
        if self._thread is None:
            return
        self._thread.join(CLOSE_S)
        if self._error is not None:
            logger.warning("%s", self._error)
        self._thread = self._error = None


class BestEffort:
    """Background jobs that write for people only: a failure is a warning, and a disk that hangs costs what comes."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        """
        Args:
            name: of the thread.
            note: takes a line for people.
        """
        self._job, self._note = Background(name), note
        self._what = name
        self._hangs = False

    def start(self, what: str, job: Callable[[], object]) -> None:
        """Begin a job, after the one before; left out if that hangs.

        Args:
            what: it writes, for the warning.
        """
        self.wait()
        if not self._job.busy():
            self._what = what
            self._job.start(job)

    def busy(self) -> bool:
        """True while a job is under way."""
        return self._job.busy()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when no job is under way. One that hangs is waited for once, so long; by default ``BEST_EFFORT_S``."""
        try:
            self._job.wait(0.0 if self._hangs else BEST_EFFORT_S if timeout_s is None else timeout_s)
            self._hangs = False
        except Exception as error:
            if not self._hangs:
                more = " What comes meanwhile is left out" if self._job.busy() else ""
                self._note(f"warning: {self._what} could not be written: {first_line(error)}{more}")
            self._hangs = self._job.busy()
