"""Stopping a run from outside, at the end of a step instead of in the middle of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
"""What ``signal.signal`` takes and returns."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a scheduler that ends the job; a scheduler that warns of the time limit."""
STOP_FILE = "stop"
"""Name of the file in the run directory that asks for a stop where no signal can reach the process."""


class StopSignal:
    """Within ``with StopSignal(...) as stop``, signals and the stop file ask for a stop instead of ending the process.

    Every rank holds one. Ranks may learn of a stop at different steps: agree on ``requested`` by a collective before
    acting on it.
    """

    def __init__(
        self, run_dir: Path | None = None, *, speak: bool = True, ending: str = "finishing this step, then saving"
    ) -> None:
        """
        Args:
            run_dir: the directory of the stop file; None: signals only.
            speak: write to stderr what a signal does; True on one rank only.
            ending: what the process does before it ends, for that message.
        """
        self.reason: str | None = None
        """What asked for the stop: a signal's name or the stop file's path; None as long as nothing did."""
        self._file = run_dir / STOP_FILE if run_dir else None
        self._speak, self._ending = speak, ending
        self._interrupts = 0
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """True once a signal came or the stop file exists. Each call asks the file system."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = str(self._file)
            self._log(f"{self._file} is there: {self._ending}.")
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.reason is None:
            self.reason = signal.Signals(number).name
        more = " Ctrl-C once more stops at once." if number == signal.SIGINT else ""
        self._log(f"{signal.Signals(number).name}: {self._ending}.{more}")

    def _log(self, text: str) -> None:
        if self._speak:
            os.write(2, f"\n{text}\n".encode())  # print() is not reentrant, and the signal may have interrupted one
