"""What a rollout server did for a request whose sender is recording a trace: it comes back with the answer.

The sender asks by a header. The server's clock is another; when the request left and its answer came, by the sender's
clock, and when it came and the answer left, by the server's, tell how far they are apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aapo.errors import WireError
from nemo_aapo.trace import spans
from nemo_aapo.trace.spans import Recorder, Sample, Span

HEADER = "X-Trace"
"""Header of a request whose answer is to end with what the server did."""
LIMIT = 20_000
"""Spans and samples of an answer."""
LONGEST_NAME = 100
SANE_NS = 2**62
"""Clocks stand below this, and names are no longer than that: anything else is no server's."""


@dataclass(frozen=True)
class Exchange:
    """A request to a server that was sent while somebody recorded, seen from here."""

    server: int
    """Its number."""
    sent: int
    """Nanoseconds of this clock."""

    def ends(self, message: Mapping[str, Any], sequences: int) -> None:
        """Record the request, and what its last message says of the server, if somebody still or again records.

        Raises:
            WireError: that can't be read.
        """
        came, process, recorder = time.perf_counter_ns(), f"rollout server {self.server}", spans.recorder
        if recorder is None:
            return
        track, facts = f"requests of {recorder.process}", {"completions": sequences}
        recorder.add("request", self.sent, came, "server", process=process, track=track, facts=facts)
        if "trace" in message:
            recorder.take(*decode(message["trace"], process, self.sent, came))


def begin(server: int) -> Exchange | None:
    """A request is about to be sent; None: nobody records."""
    return None if spans.recorder is None else Exchange(server, time.perf_counter_ns())


def refitted(server: int, version: int, began: int) -> None:
    """A server has loaded weights, which it was told at that time."""
    if (recorder := spans.recorder) is not None:
        process, name = f"rollout server {server}", f"refit to version {version}"
        recorder.add(name, began, time.perf_counter_ns(), "server", process=process, track="refit")


def encode(received: int, recorder: Recorder) -> dict[str, Any]:
    """For the last message of an answer.

    Args:
        received: when the request had come, nanoseconds of this clock.
    """
    return {
        "clock": [received, time.perf_counter_ns()],
        "spans": [[s.track, s.name, s.start, s.end, s.facts] for s in recorder.spans],
        "samples": [[s.name, s.at, s.values] for s in recorder.samples],
    }


def decode(body: object, process: str, sent: int, came: int) -> tuple[list[Span], list[Sample]]:
    """The reverse, by this process's clock.

    Args:
        process: what the server is called.
        sent, came: when the request left and its answer came.

    Raises:
        WireError: it is not what ``encode`` makes.
    """
    try:
        if not isinstance(body, Mapping) or len(body["spans"]) + len(body["samples"]) > 2 * LIMIT:
            raise ValueError("too much")
        received, answered = (_number(at) for at in body["clock"])
        ahead = ((received - sent) + (answered - came)) // 2
        own = [
            Span(process, _name(track), _name(name), "server", _number(start) - ahead, _number(end) - ahead, _plain(f))
            for track, name, start, end, f in body["spans"]
        ]
        if any(span.end < span.start for span in own):
            raise ValueError("an end before its start")
        samples = [Sample(process, _name(name), _number(at) - ahead, _plain(of)) for name, at, of in body["samples"]]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not a server's trace ({type(error).__name__}: {error})") from None
    return own, samples


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < SANE_NS:
        raise ValueError("no time")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no name")
    return value[:LONGEST_NAME]


def _plain(values: object) -> dict[str, float]:
    """Names and numbers."""
    if not isinstance(values, Mapping) or len(values) > 20:
        raise TypeError("no facts")
    return {
        _name(name): value for name, value in values.items() if type(value) in (int, float) and math.isfinite(value)
    }
