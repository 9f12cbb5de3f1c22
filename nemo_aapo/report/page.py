"""Plain data -> one HTML file that needs no network and runs nothing but its own script.

Completions are hostile input. They stand in the file as JSON in which no tag can begin or end, the script shows them by
``textContent`` alone, and the page's Content-Security-Policy names the hashes of its two scripts and styles: whatever
else might get into it is not executed and can't reach a network.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nemo_aapo
from nemo_aapo.report import charts
from nemo_aapo.report.compare import differing_settings, paired_differences, seeds_alike
from nemo_aapo.report.completions import read_groups, read_history
from nemo_aapo.report.findings import findings
from nemo_aapo.report.inert import inert_json
from nemo_aapo.report.read import read_run
from nemo_aapo.report.series import thinned
from nemo_aapo.report.timeline import read_traces
from nemo_aapo.utils.files import write_atomic

SCRIPTS = ("uPlot.iife.min.js", "plots.js", "completions.js", "timeline.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")


def write_report(runs: Sequence[Path], target: Path, state: str | None = None) -> None:
    """Write the page of a run, or of several beside each other.

    Args:
        runs: their directories.
        target: the file.
        state: of the run, where it writes its own page (``read_run``).

    Raises:
        ConfigError, RunError: a directory holds no run, or a damaged file.
    """
    described = [describe(run, 1.0 / len(runs), state) for run in runs]
    write_atomic(target, render([{**run, "name": name} for run, name in zip(described, names_of(runs), strict=True)]))


def names_of(runs: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: by their folders, as far up as tells them apart.

    >>> names_of([Path("a/seed1/run"), Path("a/seed2/run")]), names_of([Path("results/x")])
    (['seed1/run', 'seed2/run'], ['x'])
    """
    absolute = [run.absolute() for run in runs]
    for depth in range(1, max(len(path.parts) for path in absolute)):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in absolute]


def describe(run: Path, budget: float = 1.0, state: str | None = None) -> dict[str, Any]:
    """All that the page says of a run.

    Args:
        budget: its part of a page of several runs, in (0, 1].
    """
    found = read_run(run, state)
    return {
        **found,
        **{table: thinned(found[table]) for table in ("steps", "validations")},
        "findings": findings(found),
        "groups": read_groups(run, budget),
        "history": read_history(run, str(found["verdict"]), budget),
        "traces": read_traces(run) if budget == 1.0 else [],
    }


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page of runs that ``describe`` described."""
    data = {
        "runs": runs,
        "charts": {
            section: [asdict(chart) for chart in getattr(charts, section.upper())]
            for section in ("curves", "times", "groups")
        },
        "differing": differing_settings(runs),
        "alike": seeds_alike(runs),
        "paired": paired_differences(runs),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": nemo_aapo.__version__,
    }
    style, script = _joined(STYLES), _joined(SCRIPTS)
    title = ", ".join(str(run["name"]) for run in runs)
    parts = {
        "POLICY": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        "TITLE": _escaped(title if len(title) < 100 else f"{len(runs)} runs"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": inert_json(data),
    }
    return "".join(parts.get(piece, piece) for piece in _asset("page.html").split("@@"))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").encode("utf-8", "replace").decode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _joined(names: Sequence[str]) -> str:
    return "\n".join(_asset(name) for name in names)


def _asset(name: str) -> str:
    return (importlib.resources.files("nemo_aapo.report") / "assets" / name).read_text(encoding="utf-8")
