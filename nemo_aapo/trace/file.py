"""The spans of all processes as one JSON file of trace events, which ui.perfetto.dev and chrome://tracing open.

Every machine has a clock of its own. All ranks met just before the step: the moment at which the last of them came is
the same everywhere, each machine knows it to within the length of that meeting, and by it their clocks are aligned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aapo.trace.spans import LOOP, Sample, Span

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has recorded of a step."""

    rank: int
    machine: str
    """Names the machine, whose processes share a clock."""
    met: tuple[int, int]
    """Before the step all ranks met: when this one came and when it left, nanoseconds of its clock."""
    spans: Sequence[Span]
    samples: Sequence[Sample]
    left_out: int
    """Spans and samples beyond what is kept."""


def trace_of(step: int, parts: Sequence[Part]) -> dict[str, Any]:
    """The content of the file, in Chrome's trace event format; times in microseconds from the first span on.

    Args:
        parts: of all ranks, rank 0 first.
    """
    offsets, error = offsets_of(parts)
    spans = [
        span._replace(start=span.start - offsets[part.machine], end=span.end - offsets[part.machine])
        for part in parts
        for span in part.spans
    ]
    samples = [s._replace(at=s.at - offsets[part.machine]) for part in parts for s in part.samples]
    zero = min((*(span.start for span in spans), *(sample.at for sample in samples)), default=0)
    owners = {span.process for span in spans} | {sample.process for sample in samples}
    pids = {name: pid for pid, name in enumerate(_ordered(owners))}
    events: list[Event] = []
    for name, pid in pids.items():
        own = [span for span in spans if span.process == name]
        events += [*_process(pid, name), *_tracks(pid, own, zero)]
    events += [
        {"ph": "C", "pid": pids[s.process], "tid": 0, "name": s.name, "ts": (s.at - zero) / 1000, "args": s.values}
        for s in samples
    ]
    about = {
        "step": step,
        "ranks": len(parts),
        "machines": len(offsets),
        "clocks_agree_to_us": error / 1000,
        "left_out": sum(part.left_out for part in parts),
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def offsets_of(parts: Sequence[Part]) -> tuple[dict[str, int], int]:
    """How far each machine's clock is ahead of rank 0's, and how far off that may be at most; nanoseconds.

    On a machine's clock the last rank came no earlier than its own last one, and before its first one left.
    """
    bounds: dict[str, tuple[int, int]] = {}
    for part in parts:
        came, left = bounds.get(part.machine, part.met)
        bounds[part.machine] = max(came, part.met[0]), min(left, part.met[1])
    middle = {machine: (came + left) // 2 for machine, (came, left) in bounds.items()}
    halves = [(left - came) // 2 + 1 for came, left in bounds.values()]
    here = next(iter(middle.values()), 0)
    error = halves[0] + max(halves[1:]) if len(halves) > 1 else 0
    return {machine: at - here for machine, at in middle.items()}, error


def lanes(spans: Iterable[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the number of a lane: in a lane any two of them lie in one another or apart, as viewers need it.

    Spans of one thread fit into one lane; what several do at a time, such as requests, takes more.
    """
    open_ends: list[list[int]] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        for ends in open_ends:
            while ends and ends[-1] <= span.start:
                ends.pop()
        number = next((n for n, ends in enumerate(open_ends) if not ends or span.end <= ends[-1]), len(open_ends))
        if number == len(open_ends):
            open_ends.append([])
        open_ends[number].append(span.end)
        yield number, span


def _process(pid: int, name: str) -> list[Event]:
    return [
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}},
    ]


def _tracks(pid: int, spans: Sequence[Span], zero: int) -> Iterator[Event]:
    tid = 0
    for track in _ordered({span.track for span in spans}):
        first = tid + 1
        for lane, span in lanes(span for span in spans if span.track == track):
            if first + lane > tid:
                tid = first + lane
                yield _thread_name(pid, tid, track if lane == 0 else f"{track} ({lane + 1})")
            yield {
                "ph": "X",
                "pid": pid,
                "tid": first + lane,
                "name": span.name,
                "cat": span.kind,
                "ts": (span.start - zero) / 1000,
                "dur": (span.end - span.start) / 1000,
                "args": span.facts,
            }


def _thread_name(pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def _ordered(names: Iterable[str]) -> list[str]:
    """Ranks and main threads first; numbers in names count as numbers."""

    def key(name: str) -> tuple[bool, list[tuple[int, str]]]:
        parts = re.split(r"(\d+)", name)
        return not name.startswith(("rank ", LOOP)), [(int(p) if p.isdigit() else 0, p) for p in parts]

    return sorted(names, key=key)
