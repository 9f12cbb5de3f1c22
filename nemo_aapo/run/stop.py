"""Stopping a run from outside, at the end of a step instead of in the middle of one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a scheduler's end, a scheduler's warning before the time limit."""
STOP_FILE = "stop"
"""Name of the file in the run directory that asks for the same where no signal reaches."""


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
            run_dir: where the stop file is looked for; None: nowhere.
            speak: say on stderr what the first signal does; on one rank.
            ending: what is done before the end, to be said.
        """
        self.reason: str | None = None
        """What asked for the stop: a signal's name or the stop file's path; None so far."""
        self._file = run_dir / STOP_FILE if run_dir else None
        self._speak, self._ending = speak, ending
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """True once a signal came or the stop file is there; costs one look at the file system."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = str(self._file)
            self._say(f"{self._file} is there: {self._ending}.")
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.reason is None:
            self.reason = signal.Signals(number).name
        more = " Ctrl-C once more stops at once." if number == signal.SIGINT else ""
        self._say(f"{signal.Signals(number).name}: {self._ending}.{more}")

    def _say(self, text: str) -> None:
        if self._speak:
            os.write(2, f"\n{text}\n".encode())  # print() may be interrupted by the very signal that is handled here
