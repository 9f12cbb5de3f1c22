"""When to save, and when time is up: decided between steps, from the step's number and the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from nemo_aapo.config.schema import Checkpoint, Trainer


class SaveSchedule:
    """One rank's opinion; ranks agree on it by a collective, as their clocks differ."""

    def __init__(self, settings: Checkpoint, clock: Callable[[], float] = time.monotonic, elapsed: float = 0.0) -> None:
        """Args: elapsed: seconds that the run's job has been going on already: imports, loading, waiting for others."""
        self.settings, self._clock = settings, clock
        self._saved = self._stepped = clock()
        self._started = self._saved - elapsed
        self._longest_step = 0.0

    def intervals(self, trainer: Trainer) -> tuple[int, int]:
        """Steps from one checkpoint to the next (0: never): as set, and of validations if ``keep_best`` goes by them.

        A checkpoint has the figures of a validation of its own step only.
        """
        by_validation = (self.settings.keep_best or "").startswith("validation/")
        return self.settings.save_interval, trainer.val_check_interval if by_validation else 0

    def step_begins(self) -> None:
        """What was done since the last step (reference rewards were filled, say) is no part of the next one."""
        self._stepped = self._clock()

    def step_done(self) -> None:
        """A training step, with what belongs to it, is over."""
        now = self._clock()
        self._longest_step = max(self._longest_step, now - self._stepped)
        self._stepped = now

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = self._stepped = self._clock()

    def time_for_a_checkpoint(self) -> bool:
        """True once ``checkpoint.save_interval_s`` has passed since the last checkpoint."""
        interval = self.settings.save_interval_s
        return interval is not None and self._clock() - self._saved >= interval

    def time_is_up(self, save_s: float) -> bool:
        """True if another step as long as the longest so far, and a save, would end after ``checkpoint.max_time_s``.

        Args:
            save_s: seconds that a save takes; 0 as long as it isn't known.
        """
        limit = self.settings.max_time_s
        return limit is not None and self._clock() - self._started + self._longest_step + save_s > limit
