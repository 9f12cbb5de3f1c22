"""Traces of steps as far as a page shows them: which there are, and the longest spans of the newest ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_aapo.errors import RunError
from nemo_aapo.run.names import TRACES, step_name, step_of

DRAWN = 2
"""So many of the newest traces are drawn, the others named,"""
LARGEST = 64_000_000
"""of files up to so many bytes,"""
PROCESSES = 24
"""with so many processes,"""
SPANS = 1_500
"""and so many spans, the longest,"""
SHORTEST = 1 / 2_000
"""of at least this share of the whole."""
DEPTH = 6
NAME = 60

Event = Mapping[str, Any]


def read_traces(directory: Path) -> list[dict[str, Any]]:
    """The traces of a run, newest first.

    Returns:
        One dict a trace: ``step``, ``file`` (below the run directory), ``bytes``; and of those that are drawn also
        ``about``, ``span_us`` and ``tracks``: [process, track, spans], each span as [name, kind, start, duration,
        depth], in microseconds.

    Raises:
        RunError: a file is damaged.
    """
    steps = sorted(step for path in (directory / TRACES).glob("step_*.json") if (step := step_of(path.stem)))
    found: list[dict[str, Any]] = []
    for step in reversed(steps):
        file = f"{TRACES}/{step_name(step)}.json"
        size = (directory / file).stat().st_size
        drawn = len(found) < DRAWN and size <= LARGEST
        found.append({"step": step, "file": file, "bytes": size, **(_drawn(directory / file) if drawn else {})})
    return found


def _drawn(path: Path) -> dict[str, Any]:
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        about, events = dict(trace["otherData"]), list(trace["traceEvents"])
        names = {(e["pid"], e["tid"], e["name"]): str(e["args"]["name"])[:NAME] for e in events if _names(e)}
        spans = [event for event in events if event["ph"] == "X"]
        if any(not (math.isfinite(e["ts"]) and 0 <= e["dur"] < math.inf) for e in spans):
            raise ValueError("times")
        whole = max((e["ts"] + e["dur"] for e in spans), default=0)
        shown = set(sorted({e["pid"] for e in spans})[:PROCESSES])
        long = [e for e in spans if e["dur"] >= SHORTEST * whole and e["pid"] in shown]
        keep = sorted(long, key=lambda e: (e["cat"] != "phase", -e["dur"]))[:SPANS]
        tracks = [
            [names[pid, 0, "process_name"], names[pid, tid, "thread_name"], own]
            for (pid, tid), own in sorted(_by_track(keep).items())
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: no trace ({type(error).__name__}). Remove it: it is only for people") from None
    numbers = {str(k): v for k, v in about.items() if type(v) in (int, float) and math.isfinite(v)}
    return {"about": numbers, "span_us": whole, "tracks": tracks}


def _names(event: Event) -> bool:
    return event["ph"] == "M" and event["name"] in ("process_name", "thread_name")


def _by_track(spans: Iterable[Event]) -> dict[tuple[int, int], list[list[Any]]]:
    """(pid, tid) -> its spans, each with how deep it lies in others that are shown."""
    found: dict[tuple[int, int], list[list[Any]]] = {}
    ends: dict[tuple[int, int], list[float]] = {}
    for e in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        key = int(e["pid"]), int(e["tid"])
        own = ends.setdefault(key, [])
        while own and own[-1] <= e["ts"]:
            own.pop()
        if len(own) < DEPTH:
            shown = [str(e["name"])[:NAME], str(e["cat"])[:NAME], round(e["ts"], 1), round(e["dur"], 1), len(own)]
            found.setdefault(key, []).append(shown)
        own.append(e["ts"] + e["dur"])
    return found
