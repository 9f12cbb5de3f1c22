"""A page that shows a run, or compares several; it needs no network and no server: ``nemo-aapo report RUN ...``.

report RUN                     RUN/report.html: curves, completions, where the time went, what to look at
report RUN RUN ... [out=FILE]  the runs beside each other, in comparison.html of the folder that they share
report FOLDER                  all runs below it, such as those of a sweep
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_aapo.cli.main import exit_code
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.overview import is_run, runs_below
from nemo_aapo.report.page import write_report
from nemo_aapo.run.names import REPORT
from nemo_aapo.utils.files import expanded, require_file

COMPARISON = "comparison.html"
MOST_RUNS = 32
"""More curves than that nobody can tell apart."""


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return exit_code(lambda: _report(words))


def _report(words: Sequence[str]) -> int:
    if not words or set(words) & {"--help", "-h"}:
        print(__doc__)
        return 0
    outs = [Path(expanded(word.removeprefix("out="), "out=")) for word in words if word.startswith("out=")]
    named = [Path(expanded(word, repr(word))) for word in words if not word.startswith("out=")]
    if option := next((word for word in words if word.startswith("-")), None):
        raise ConfigError(f"{option}: no such option; see --help")
    runs = runs_of(named)
    target = outs[-1] if outs else _target(named, runs)
    require_file(target, f"out={target}")
    write_report(runs, target)
    counted = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    print(f"{target}: {counted}, {target.stat().st_size / 1000:,.0f} kB; open it in a browser")
    return 0


def runs_of(named: Sequence[Path]) -> list[Path]:
    """The run directories that are named, or lie below a folder that is.

    Raises:
        ConfigError: there is no run, or more than a page can show.
    """
    found: dict[Path, None] = {}
    for path in named:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such directory")
        below = [path] if is_run(path) else runs_below(path)
        if not below:
            raise ConfigError(f"{path}: no run is there or below. `nemo-aapo runs` lists those of a folder")
        found.update(dict.fromkeys(below))
    if not found:
        raise ConfigError("name a run: nemo-aapo report results/quickstart")
    if len(found) > MOST_RUNS:
        raise ConfigError(f"{len(found)} runs: a page compares up to {MOST_RUNS}; name those that matter")
    return list(found)


def _target(named: Sequence[Path], runs: Sequence[Path]) -> Path:
    if len(runs) == 1:
        return runs[0] / REPORT
    return (
        named[0] if len(named) == 1 else Path(os.path.commonpath([run.absolute().parent for run in runs]))
    ) / COMPARISON
