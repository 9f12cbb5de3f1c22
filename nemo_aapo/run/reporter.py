"""Where the loop reports to: the run directory, the screen, and the stop signal, behind one small interface."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from nemo_aapo.run.experiment import Experiment, SilentExperiment
from nemo_aapo.run.progress import Progress
from nemo_aapo.run.stop import StopSignal

PHASE_EVERY_S = 5.0
"""``phase.json`` is written at most this often."""


class Notes(Protocol):
    """Where parts leave a line for people while they are built; all that is needed where nothing is trained."""

    def note(self, text: str) -> None: ...


@runtime_checkable
class Reporter(Notes, Protocol):
    """Where the loop reports to; on ranks other than 0 it says nothing."""

    def begin(self, step: int, *, validated: bool) -> None: ...
    def phase(self, name: str, done: int, total: int) -> None: ...
    def sync(self) -> None: ...
    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...
    def log_validation(self, step: int, metrics: dict[str, float], samples: Sequence[dict[str, Any]]) -> None: ...
    def save_rollouts(self, name: str, samples: Sequence[dict[str, Any]]) -> None: ...
    def stop_requested(self) -> bool: ...


class RunReporter:
    """The ``Reporter`` of a run. On ranks other than 0 experiment and progress are the silent ones."""

    def __init__(
        self,
        experiment: Experiment | SilentExperiment,
        progress: Progress,
        stop: StopSignal,
        *,
        console_samples: int,
        after_validation: Callable[[int, Sequence[dict[str, Any]]], None] = lambda step, samples: None,
    ) -> None:
        """
        Args:
            console_samples: completions shown on the screen at each validation.
            after_validation: called with step and samples once a validation is in the files.
        """
        self.experiment, self.progress, self.stop = experiment, progress, stop
        self.console_samples, self.after_validation = console_samples, after_validation
        self._phase: str | None = None
        self._done = 0
        self._began = self._written = 0.0

    def begin(self, step: int, *, validated: bool) -> None:
        """The run starts (-1) or goes on from a checkpoint of ``step``, whose validation may still be to be made."""
        self.experiment.resume_at(step, validated=validated)
        if step >= 0:
            self.note(f"going on from the checkpoint of step {step}")
            for warning in self.experiment.warnings:
                self.note(f"warning: {warning}")

    def phase(self, name: str, done: int, total: int) -> None:
        """Work that is not a step: ``done`` of ``total``."""
        if self._phase != name:
            self._phase, self._done, self._began, self._written = name, 0, time.time(), 0.0
            self.progress.phase(name, total)
        if done > self._done:
            self.progress.advance(done - self._done)
            self._done = done
        if time.time() - self._written >= PHASE_EVERY_S:
            self._written = time.time()
            self.experiment.save_phase({"phase": name, "done": done, "total": total, "began": self._began})

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase = None
            self.experiment.save_phase(None)

    def note(self, text: str) -> None:
        """One line that stays on the screen."""
        self.progress.note(text)

    def sync(self) -> None:
        """Return when all that was logged is on the disk."""
        self.experiment.sync()

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a training step, to files and screen."""
        self._end_phase()
        self.experiment.log_step(step, metrics)
        self.progress.step(step, metrics)

    def log_validation(self, step: int, metrics: dict[str, float], samples: Sequence[dict[str, Any]]) -> None:
        """Metrics and completions of a validation; a few of the sampled ones are shown."""
        self._end_phase()
        self.experiment.log_validation(step, metrics)
        self.experiment.save_rollouts(f"step_{step:06d}", samples)
        self.progress.validation(step, metrics)
        self.after_validation(step, samples)
        for sample in samples[:: max(1, len(samples) // max(1, self.console_samples))][: self.console_samples]:
            reward = "not scored" if math.isnan(sample["reward"]) else f"reward {sample['reward']:g}"
            self.note(
                f"  {_one_line(sample['prompt'])!r} -> {_one_line(sample['completion'])!r}  "
                f"{reward} (answer {sample['answer']})"
            )

    def save_rollouts(self, name: str, samples: Sequence[dict[str, Any]]) -> None:
        """``rollouts/NAME.jsonl``."""
        self.experiment.save_rollouts(name, samples)

    def stop_requested(self) -> bool:
        """True once a signal or the stop file asked for an end."""
        return self.stop.requested


def _one_line(text: str, limit: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
