"""Spans of time and samples of counters in this process, for as long as somebody records them.

Whoever does something worth seeing says so with ``span``, ``phase``, or ``recorder.add`` after the fact. While nobody
records, that costs one check. Times are of ``time.perf_counter_ns``: all processes of a machine share that clock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

Kind = Literal["step", "phase", "part", "micro-batch", "collective", "wait", "score", "server"]
ALWAYS = ("step", "phase")
"""Kinds that are few, and kept however many spans there are."""
LOOP = "loop"
"""Track of a process's main thread."""


class Span(NamedTuple):
    """Something that took time."""

    process: str
    """Such as ``rank 0``, ``rollout server 1``."""
    track: str
    """Who in the process it was: a thread, a worker."""
    name: str
    kind: Kind
    start: int
    """Nanoseconds."""
    end: int
    facts: dict[str, Any]
    """What else is known: sizes, numbers."""


class Sample(NamedTuple):
    """What counters stood at."""

    process: str
    name: str
    at: int
    """Nanoseconds."""
    values: dict[str, float]


class Recorder:
    """Takes spans and samples from all threads of a process."""

    def __init__(self, process: str, limit: int) -> None:
        """
        Args:
            process: what it is called.
            limit: so many spans and samples of each phase are kept, from its beginning on.
        """
        self.process, self.limit = process, limit
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.left_out = 0
        """Spans and samples beyond the limit."""
        self._room = limit
        self._latest: dict[tuple[str, str], Mapping[str, float]] = {}

    def add(
        self,
        name: str,
        start: int | float,
        end: int | float,
        kind: Kind = "part",
        *,
        process: str = "",
        track: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what has ended.

        Args:
            start, end: nanoseconds of ``perf_counter_ns``, or seconds of ``perf_counter`` as floats.
            process, track: by default this one, and this thread.
        """
        if kind not in ALWAYS and not self._has_room():
            return
        first, last = (t if isinstance(t, int) else round(t * 1e9) for t in (start, end))
        self.spans.append(Span(process or self.process, track or _thread(), name, kind, first, last, dict(facts or {})))

    def sample(self, name: str, *, process: str = "", **values: float) -> None:
        """Record what counters stand at, if they have changed."""
        key = process or self.process, name
        if self._latest.get(key) != values and self._has_room():
            self._latest[key] = values
            self.samples.append(Sample(*key, time.perf_counter_ns(), values))

    def take(self, spans: Sequence[Span], samples: Sequence[Sample]) -> None:
        """Take over what another process has recorded, by this one's clock."""
        self.spans += [span for span in spans if self._has_room()]
        self.samples += [sample for sample in samples if self._has_room()]

    @contextlib.contextmanager
    def span(self, name: str, kind: Kind, facts: Mapping[str, Any]) -> Iterator[None]:
        """Record what happens inside."""
        if kind == "phase":
            self._room = self.limit
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter_ns(), kind, facts=facts)

    def _has_room(self) -> bool:
        self._room -= 1
        self.left_out += self._room < 0
        return self._room >= 0


recorder: Recorder | None = None
"""Who records; None: nobody does."""
_NOTHING = contextlib.nullcontext()


def start(process: str, limit: int) -> Recorder:
    """Record from now on."""
    global recorder
    recorder = Recorder(process, limit)
    return recorder


def stop() -> None:
    """Record no more."""
    global recorder
    recorder = None


def span(name: str, kind: Kind = "part", **facts: Any) -> AbstractContextManager[None]:
    """What happens inside takes this long."""
    return _NOTHING if recorder is None else recorder.span(name, kind, facts)


def phase(name: str) -> AbstractContextManager[None]:
    """The same of a part of the loop."""
    return span(name, "phase")


def timed(name: str, start: float, end: float, kind: Kind = "phase") -> None:
    """A part of the loop that was timed for a metric: what a trace shows is what the metric says.

    Args:
        start, end: seconds of ``time.perf_counter``.
    """
    if recorder is not None:
        recorder.add(name, start, end, kind)


def _thread() -> str:
    thread = threading.current_thread()
    return LOOP if thread is threading.main_thread() else thread.name
