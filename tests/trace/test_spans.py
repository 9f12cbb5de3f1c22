"""What is recorded, and the file that is made of it: pure functions, no run."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from nemo_aapo.trace import spans
from nemo_aapo.trace.file import Part, lanes, offsets_of, trace_of
from nemo_aapo.trace.spans import Recorder, Sample, Span

pytestmark = pytest.mark.unit


@pytest.fixture
def recorder():
    yield spans.start("rank 0", 5)
    spans.stop()


def span(start, end, name="x", process="rank 0", track="loop"):
    return Span(process, track, name, "part", start, end, {})


def part(rank=0, machine="a", met=(0, 10), spans=(), samples=()):
    return Part(rank, machine, met, list(spans), list(samples), 0)


def test_while_nobody_records_nothing_is_kept_and_nothing_is_made():
    assert spans.recorder is None
    assert spans.span("a", some="fact") is spans.span("b") is spans.phase("c")


def test_spans_nest_and_name_their_thread(recorder):
    def other():
        with spans.span("there"):
            pass

    with spans.phase("outer"), spans.span("inner", count=3):
        thread = threading.Thread(target=other, name="helper")
        thread.start()
        thread.join()
    there, inner, outer = recorder.spans
    assert (there.track, inner.track, outer.kind) == ("helper", "loop", "phase")
    assert inner.facts == {"count": 3}
    assert outer.start <= inner.start <= there.start <= there.end <= inner.end <= outer.end


def test_a_phase_keeps_its_first_spans_and_every_phase_is_kept(recorder):
    for _ in range(2):
        with spans.phase("much"):
            for _ in range(9):
                with spans.span("small"):
                    pass
    kinds = [s.kind for s in recorder.spans]
    assert kinds == [*["part"] * 5, "phase"] * 2
    assert recorder.left_out == 8


def test_counters_are_kept_when_they_change(recorder):
    for live in (1, 1, 2, 2, 1):
        recorder.sample("rows", live=live)
    assert [sample.values["live"] for sample in recorder.samples] == [1, 2, 1]


def test_seconds_and_nanoseconds_are_of_one_clock(recorder):
    before, seconds, after = time.perf_counter_ns(), time.perf_counter(), time.perf_counter_ns()
    recorder.add("x", seconds, seconds)
    assert before - 1 <= recorder.spans[0].start <= after + 1


def test_any_spans_become_lanes_in_which_they_lie_in_one_another_or_apart():
    rng = np.random.default_rng(7)
    for _ in range(50):
        starts = rng.integers(0, 50, 30)
        many = [span(int(s), int(s + d)) for s, d in zip(starts, rng.integers(0, 20, 30), strict=True)]
        placed = list(lanes(many))
        assert sorted(s for _, s in placed) == sorted(many)
        assert_nested([(lane, s.start, s.end) for lane, s in placed])


def test_what_one_thread_does_fits_into_one_lane(recorder):
    recorder.limit = recorder._room = 10**6
    for _ in range(30):
        with spans.span("a"), spans.span("b"):
            pass
        with spans.span("c"):
            pass
    assert {lane for lane, _ in lanes(recorder.spans)} == {0}


def test_clocks_of_machines_are_aligned_by_the_moment_at_which_the_last_rank_came():
    """The clock of machine b is 1000 ahead; the last rank comes at 500 by a's clock."""
    a, late = part(0, "a", (100, 510), [span(600, 700)]), part(1, "a", (500, 512))
    b = part(2, "b", (1300, 1506), [span(1600, 1700, process="rank 2")])
    c = part(3, "b", (1494, 1508))
    offsets, error = offsets_of([a, late, b, c])
    assert offsets["a"] == 0
    assert abs(offsets["b"] - 1000) <= error <= 15
    events = trace_of(4, [a, late, b, c])["traceEvents"]
    ts = [event["ts"] for event in events if event["ph"] == "X"]
    assert abs(ts[0] - ts[1]) <= error / 1000
    assert offsets_of([a, late])[1] == 0, "one machine has one clock"


def test_the_file_is_what_perfetto_reads():
    own = [span(2_000, 9_500, "step"), span(3_000, 4_000, "rollout")]
    scores = [span(2_500, 5_000, process="reward workers of rank 0", track=f"worker {n}") for n in (10, 9)]
    requests = [span(1_000 + n, 5_000 + n, process="rollout server 0", track="requests") for n in (0, 1)]
    samples = [Sample("rank 0", "rows", 3_000, {"live": 2, "waiting": 5})]
    trace = trace_of(7, [part(spans=[*own, *scores, *requests], samples=samples)])
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert_perfetto(trace["traceEvents"])
    names = [
        event["args"]["name"] for event in trace["traceEvents"] if event["name"] in ("process_name", "thread_name")
    ]
    assert names == [
        *("rank 0", "loop"),
        *("reward workers of rank 0", "worker 9", "worker 10"),
        *("rollout server 0", "requests", "requests (2)"),
    ]
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert [(c["ts"], c["args"]) for c in counters] == [(2.0, {"live": 2, "waiting": 5})]
    assert trace["otherData"]["step"] == 7


def test_a_rank_that_recorded_nothing_is_no_trouble():
    assert trace_of(1, [part(), part(1, "b")])["traceEvents"] == []


def test_what_another_process_recorded_is_bounded_as_well():
    mine = Recorder("rank 0", 3)
    mine.take([span(0, 1)] * 5, [Sample("s", "rows", 0, {})] * 5)
    assert (len(mine.spans), len(mine.samples), mine.left_out) == (3, 0, 7)


# ---------------------------------------------------------------- what a viewer needs


def assert_perfetto(events):
    """Chrome's trace event format: complete events that nest, in tracks and processes that have names."""
    named = {
        (e["pid"], e["tid"] if e["name"] == "thread_name" else None)
        for e in events
        if e["ph"] == "M" and e["name"] in ("process_name", "thread_name") and e["args"]["name"]
    }
    assert {e["ph"] for e in events} <= {"X", "M", "C"}
    by_track: dict[tuple[int, int], list] = {}
    for event in events:
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["name"]
        assert (event["pid"], None) in named
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(v, int | float) for v in event["args"].values())
            continue
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named
        by_track.setdefault((event["pid"], event["tid"]), []).append(event)
    for own in by_track.values():
        assert_nested([(0, round(e["ts"] * 1000), round(e["ts"] * 1000) + round(e["dur"] * 1000)) for e in own])


def assert_nested(intervals):
    """(lane, start, end): in a lane any two lie in one another or apart."""
    open_ends: dict[int, list[int]] = {}
    for lane, start, end in sorted(intervals, key=lambda i: (i[0], i[1], -i[2])):
        ends = open_ends.setdefault(lane, [])
        while ends and ends[-1] <= start:
            ends.pop()
        assert not ends or end <= ends[-1], (lane, start, end)
        ends.append(end)
