"""The progress of a run on the screen: a live bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import collections
import datetime
import io
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from nemo_aapo.utils.tables import time_left

QUIET_S = 30.0
"""Without a terminal, a phase prints a line at most this often once the first step is done."""
REFRESH_S = 0.2
"""On a terminal, the bar is redrawn at most this often."""
STEPS_IN_ESTIMATE = 20
"""Number of the latest steps from which the time left is estimated."""


class Progress:
    """Shows the steps of a run, and the phases before and within them: loading, reference rewards, rollout, validating.

    Ranks other than 0 make one with ``enabled=False``, which takes every call and shows nothing.
    """

    def __init__(self, total: int, start: int = 0, *, stream: TextIO | None = None, enabled: bool = True) -> None:
        """
        Args:
            total: number of steps of the whole run.
            start: number of steps that earlier parts of the run have made.
            stream: the file or terminal to write to; None: stdout.
            enabled: False shows nothing.
        """
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._total, self._step = total, start
        self._seconds: collections.deque[float] = collections.deque(maxlen=STEPS_IN_ESTIMATE)
        self._accuracy: float | None = None
        self._numbers = ""
        self._phase, self._phase_total, self._phase_count, self._phase_began = "", 0, 0, 0.0
        self._stepped = False
        self._shown_at = 0.0
        form = "step {n_fmt}/{total_fmt} |{bar:20}| {desc}"
        self._bar = (
            tqdm(total=total, initial=start, file=self._stream, bar_format=form, dynamic_ncols=True)
            if enabled and _is_live(self._stream)
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def phase(self, name: str, total: int = 0) -> None:
        """Begin a phase, which ends with the next phase or step; ``total`` units of work, 0 if unknown."""
        self._phase, self._phase_total, self._phase_count, self._phase_began = name, total, 0, time.monotonic()
        self._show_phase(urgent=not self._stepped)

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units of the phase's work as done."""
        self._phase_count += count
        self._show_phase(urgent=not self._stepped and self._phase_count == self._phase_total)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a training step that is done; ``metrics`` as in ``metrics.jsonl``."""
        self._step, self._stepped = step, True
        self._end_phase()
        if "time/step" in metrics:
            self._seconds.append(metrics["time/step"])
        self._numbers = "  ".join(self._step_parts(metrics))
        if self._bar is not None:
            self._bar.n = step
            self._redraw()
        else:
            self._line(f"step {step}/{self._total}  {self._numbers}")

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a validation that is done; ``metrics`` as in ``metrics.jsonl``."""
        self._accuracy = metrics["validation/accuracy_greedy"]
        text = f"validation at step {step}: accuracy {self._accuracy:.3f} greedy"
        if "validation/accuracy_sampled" in metrics:
            text += f", {metrics['validation/accuracy_sampled']:.3f} sampled"
            text += f" (standard error {metrics['validation/accuracy_sampled_stderr']:.3f})"
        if failed := metrics.get("validation/failed_fraction"):
            text += f"; {failed:.1%} could not be judged"
        self.note(text)

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        if self._bar is not None:
            self._bar.clear()
            self._line(text)
            self._redraw()
        else:
            self._line(text)

    def close(self) -> None:
        """Draw the bar a last time, and let go of the terminal."""
        if self._bar is not None:
            self._end_phase()
            self._redraw()
            self._bar.close()

    def _step_parts(self, metrics: Mapping[str, float]) -> list[str]:
        parts = [f"reward {metrics['reward/mean']:.3f}"] if "reward/mean" in metrics else []
        if failed := metrics.get("reward/failed_fraction"):
            parts.append(f"{failed:.1%} not scored")
        if self._accuracy is not None:
            parts.append(f"val_accuracy {self._accuracy:.3f}")  # of the last validation, greedy
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if self._seconds:
            left = (self._total - self._step) * sum(self._seconds) / len(self._seconds)
            parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        return parts

    def _show_phase(self, urgent: bool) -> None:
        quiet_s = QUIET_S if self._bar is None else REFRESH_S
        if not urgent and time.monotonic() - self._shown_at < quiet_s:
            return
        if self._bar is not None:
            self._redraw()
        else:
            self._line(self._phase_text())

    def _end_phase(self) -> None:
        self._phase, self._phase_total, self._phase_count = "", 0, 0

    def _phase_text(self) -> str:
        count = f" {self._phase_count} of {self._phase_total}" if self._phase_total else ""
        left = time_left(time.monotonic() - self._phase_began, self._phase_count, self._phase_total)
        return self._phase + count + left

    def _redraw(self) -> None:
        assert self._bar is not None
        self._shown_at = time.monotonic()
        self._bar.set_description_str("  ".join(part for part in (self._numbers, self._phase_text()) if part))

    def _line(self, text: str) -> None:
        if self._enabled:
            self._shown_at = time.monotonic()
            print(text, file=self._stream, flush=True)


def _is_live(stream: TextIO) -> bool:
    """True for a terminal that a bar fits on: some pseudo-terminals have no width, and tqdm would show nothing."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, io.UnsupportedOperation):
        return True  # not a file of this system, but it says that it is a terminal
