"""Stopping a run from outside, at the end of a step instead of in the middle of one.

What computes goes on to the end of its step. What waits for others (servers, reward workers, another run) asks ``heed``
about once a second, and is broken off by ``Interrupted`` soon after a stop was asked for.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from nemo_aapo.errors import Interrupted
from nemo_aapo.utils.job import seconds_since_start

Handler = Callable[[int, FrameType | None], object] | int | None
"""What ``signal.signal`` takes and returns."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a scheduler that ends the job; a scheduler that warns of the time limit."""
STOP_FILE = "stop"
"""Name of the file in the run directory that asks for a stop where no signal can reach the process."""
PATIENCE_S = 10.0
"""Seconds that a wait may still take once a stop was asked for: what is nearly there is worth them."""


class StopSignal:
    """Within ``with StopSignal(...) as stop``, signals and the stop file ask for a stop instead of ending the process.

    Every rank holds one. Ranks may learn of a stop at different steps: agree on ``requested`` by a collective before
    acting on it.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        limit_s: float | None = None,
        speak: bool = True,
        ending: str = "finishing this step, then saving",
    ) -> None:
        """
        Args:
            run_dir: the directory of the stop file; None: signals only.
            limit_s: seconds after the job's start at which a stop is due as well; None: never.
            speak: write to stderr what a signal does; True on one rank only.
            ending: what the process does before it ends, for that message.
        """
        self.reason: str | None = None
        """What asked for the stop: a signal's name, the stop file's path, a setting; None: nothing did."""
        self._file = run_dir / STOP_FILE if run_dir else None
        self._limit_s = math.inf if limit_s is None else limit_s
        self._speak, self._ending = speak, ending
        self._asked_at = math.inf
        self._interrupts = 0
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        _heeded.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _heeded.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """True once a signal came, the stop file exists or the time is over. Each call asks the file system."""
        if self.reason is None and self._file is not None and self._file.exists():
            self._ask(str(self._file), f"{self._file} is there: {self._ending}.")
        if self.reason is None and self._limit_s < math.inf and seconds_since_start() > self._limit_s:
            self._ask("checkpoint.max_time_s", f"{self._limit_s:g} s are over (checkpoint.max_time_s): {self._ending}.")
        return self.reason is not None

    def requested_for(self, seconds: float) -> bool:
        """The same, once the first such call is at least so long ago."""
        return self.requested and time.monotonic() - self._asked_at >= seconds

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        more = " Ctrl-C once more stops at once." if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        self._ask(self.reason or name, f"{name}: {self._ending}.{more}")

    def _ask(self, reason: str, text: str) -> None:
        self.reason, self._asked_at = reason, min(self._asked_at, time.monotonic())
        if self._speak:
            os.write(2, f"\n{text}\n".encode())  # print() is not reentrant, and the signal may have interrupted one


_heeded: list[StopSignal] = []
"""Those that this process is within; signals are the process's, so whoever waits need not be handed one."""


def heed(waiting_for: str, patience_s: float | None = None) -> None:
    """To be called now and then by whatever waits, in any thread; does nothing unless a stop was asked for.

    Args:
        waiting_for: for the message.
        patience_s: seconds that the wait may go on after that; ``PATIENCE_S`` by default.

    Raises:
        Interrupted: it has gone on for so long. Others may not know yet: have all ranks ``agree``.
    """
    for stop in _heeded:
        if stop.requested_for(PATIENCE_S if patience_s is None else patience_s):
            raise Interrupted(f"{stop.reason} came while waiting for {waiting_for}")
