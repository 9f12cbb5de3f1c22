"""One job at a time in a thread beside the main one, which gets the error that the job ends in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from nemo_aapo.errors import RunError

logger = logging.getLogger(__name__)

CLOSE_S = 60.0
"""Seconds that a process which ends in an error waits for its job."""
WAIT_S = 1800.0
"""Seconds that a job may keep whoever waits for it: disks of clusters can hang for ever."""


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

    def wait(self, timeout_s: float = WAIT_S) -> None:
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
