"""The logs of all ranks as one text: the last lines of each, and what is added to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LAST_LINES = 10


class Tail:
    """Follows every ``*.log`` of a directory, those that come later too."""

    def __init__(self, folder: Path, *, from_end: bool) -> None:
        """Args: from_end: what is there already is left out."""
        self.folder = folder
        self._read: dict[Path, int] = {}
        if from_end:
            self._read = {path: path.stat().st_size for path in folder.glob("*.log")}

    def lines(self) -> Iterator[str]:
        """New whole lines of all files, each with its file's name before it."""
        for path in sorted(self.folder.glob("*.log")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]  # a line that is still written comes next time
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                yield _labelled(path, line)


def last_lines(folder: Path) -> list[str]:
    """The end of each file of a directory."""
    return [
        _labelled(path, line)
        for path in sorted(folder.glob("*.log"))
        for line in path.read_text(errors="replace").splitlines()[-LAST_LINES:]
    ]


def _labelled(path: Path, line: str) -> str:
    return f"{path.stem:<12} | {line}"
