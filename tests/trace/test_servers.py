"""What a rollout server did comes back by the sender's clock, and what is no trace is refused."""

from __future__ import annotations

import json
import time

import pytest

from nemo_aapo.errors import WireError
from nemo_aapo.trace import servers, spans
from nemo_aapo.trace.spans import Recorder

pytestmark = pytest.mark.unit

AHEAD = 10**12
"""Nanoseconds by which the server's clock is ahead of ours."""


def server_side() -> dict:
    """An answer's trace, as it comes off the wire, of a server whose clock is ahead."""
    recorder = Recorder("", 10)
    now = time.perf_counter_ns()
    recorder.add("generate", now + AHEAD, now + AHEAD + 500, "server", track="engine", facts={"prompts": 2})
    recorder.sample("rows", live=3, waiting=1)
    body = servers.encode(now + AHEAD - 100, recorder)
    body["clock"] = [now + AHEAD - 100, now + AHEAD + 900]
    body["samples"][0][1] = now + AHEAD + 250
    return json.loads(json.dumps(body))


def test_a_servers_spans_and_counters_come_by_our_clock():
    body = server_side()
    received, answered = (at - AHEAD for at in body["clock"])
    (span,), (sample,) = servers.decode(body, "rollout server 3", received - 40, answered + 40)
    assert (span.process, span.track, span.name, span.kind) == ("rollout server 3", "engine", "generate", "server")
    assert (span.start - received, span.end - span.start, span.facts) == (100, 500, {"prompts": 2})
    assert (sample.at - received, sample.values) == (350, {"live": 3, "waiting": 1})


def test_a_request_is_recorded_by_whoever_records_when_its_answer_has_come():
    assert servers.begin(0) is None
    spans.start("rank 0", 10)
    try:
        asked = servers.begin(1)
        spans.stop()
        asked.ends({"done": 4}, 4)  # the step has ended
        recorder = spans.start("rank 0", 10)
        asked.ends({"done": 4, "trace": server_side()}, 4)
        assert [span.name for span in recorder.spans] == ["request", "generate"]
        assert {span.process for span in recorder.spans} == {"rollout server 1"}
        assert recorder.spans[0].facts == {"completions": 4}
    finally:
        spans.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clock", [1]),
        ("clock", [-1, 2]),
        ("clock", ["1", "2"]),
        ("clock", [True, False]),
        ("clock", [2**63, 1]),
        ("spans", None),
        ("spans", [[]]),
        ("spans", [["engine", "x", 5, 4, {}]]),
        ("spans", [["engine", 7, 1, 2, {}]]),
        ("spans", [["engine", "x", 1.5, 2, {}]]),
        ("spans", [["engine", "x", 1, 2, []]]),
        ("spans", [["engine", "x", 1, 2, {}]] * (2 * servers.LIMIT)),
        ("samples", [["rows", 1, 3]]),
        ("samples", [["rows", 1, {str(i): 1 for i in range(21)}]]),
        ("samples", 5),
    ],
)
def test_what_is_no_trace_is_refused(key, value):
    with pytest.raises(WireError, match="not a server's trace"):
        servers.decode({**server_side(), key: value}, "s", 0, 1)
    for body in (None, [], "x", {}):
        with pytest.raises(WireError, match="not a server's trace"):
            servers.decode(body, "s", 0, 1)


def test_names_are_cut_and_facts_that_are_no_numbers_left_out():
    body = server_side()
    body["spans"] = [["t" * 999, "n" * 999, 1, 2, {"a": "x", "b": 1, "c": None, "d": True, "e": float("inf")}]]
    (span,), _ = servers.decode(body, "s", 0, 1)
    assert len(span.track) == len(span.name) == servers.LONGEST_NAME
    assert span.facts == {"b": 1}
