"""All runs below a folder in a table: how far, how they fare, when they last gave a sign of life.

runs [FOLDER]     default: results
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_aapo.cli.main import exit_code
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import overview


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return exit_code(lambda: _runs(words))


def _runs(words: Sequence[str]) -> int:
    if set(words) & {"--help", "-h"}:
        print(__doc__)
        return 0
    if len(words) > 1:
        raise ConfigError(f"one folder, not {len(words)}")
    folder = Path(words[0] if words else "results")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such directory")
    runs = overview.runs_below(folder)
    print(overview.table(folder, runs) if runs else f"{folder}: no run is there or below")
    return 0
