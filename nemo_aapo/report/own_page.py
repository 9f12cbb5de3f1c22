"""The page that a run writes of itself: in the background, and whatever happens to it, the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_aapo.errors import first_line
from nemo_aapo.report.page import write_report
from nemo_aapo.run.names import REPORT
from nemo_aapo.utils.background import Background


class OwnPage:
    """Writes ``report.html`` in the run directory, on one rank."""

    def __init__(self, directory: Path, note: Callable[[str], None], *, enabled: bool) -> None:
        """
        Args:
            directory: the run's.
            note: takes a line for people.
            enabled: False on the ranks that write nothing.
        """
        self.directory, self.note, self.enabled = directory, note, enabled
        self._job = Background("report")

    def begin(self, state: str = "running") -> None:
        """Have the page written by the files as they are now; returns as soon as the one before is done."""
        if self.enabled:
            self._wait()
            self._job.start(lambda: write_report([self.directory], self.directory / REPORT, state))

    def finish(self, state: str) -> None:
        """Write the last page; all files but ``finished`` are there."""
        self.begin(state)
        self._wait()

    def _wait(self) -> None:
        try:
            self._job.wait()
        except Exception as error:  # it is for people only, and no reason to end a run
            self.note(f"warning: {self.directory / REPORT} could not be written: {first_line(error)}")
