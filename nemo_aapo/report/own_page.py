"""The page that a run writes of itself: in the background, and whatever happens to it, the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_aapo.report.page import write_report
from nemo_aapo.run.names import REPORT
from nemo_aapo.utils.background import BestEffort

FINISH_S = 20.0
"""Seconds that a run which ends waits for its page, which takes one or two."""


class OwnPage:
    """Writes ``report.html`` in the run directory, on one rank."""

    def __init__(self, directory: Path, note: Callable[[str], None], *, enabled: bool) -> None:
        """
        Args:
            directory: the run's.
            note: takes a line for people.
            enabled: False on the ranks that write nothing.
        """
        self.directory, self.enabled = directory, enabled
        self.path = directory / REPORT
        self._job = BestEffort("report", note)

    def begin(self, state: str = "running") -> None:
        """Have the page written by the files as they are now, unless the one before is still being written."""
        if self.enabled and not self._job.busy():
            self._job.start(str(self.path), lambda: write_report([self.directory], self.path, state))

    def finish(self, state: str) -> None:
        """Write the last page; all files but ``finished`` are there."""
        self._job.wait(FINISH_S)
        self.begin(state)
        self._job.wait(FINISH_S)
