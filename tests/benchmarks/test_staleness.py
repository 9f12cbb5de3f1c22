"""A run on servers that wait takes the time that its simulation says, whatever else the machine does meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest

from benchmarks import paced, paced_run
from benchmarks.paced import Pace, lengths_of, planned
from benchmarks.staleness import Plan, Row, balanced, measure, picture, simulated, table

PACE = Pace(servers=2, prompts=4, group_size=2, mean_tokens=20, tail_factor=2.5, token_s=0.03, steps=6)
TICK_S = 0.002


class Clock:
    """Of a process, in place of the module ``time``: it stands still while the process is not given a core."""

    def __init__(self) -> None:
        self._ticks, self._ticked, self._over = 0, threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.wait(TICK_S):
            with self._ticked:
                self._ticks += 1
                self._ticked.notify_all()

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def perf_counter(self) -> float:
        return self._ticks * TICK_S

    def sleep(self, seconds: float) -> None:
        end = self.perf_counter() + seconds
        with self._ticked:
            self._ticked.wait_for(lambda: self.perf_counter() >= end - TICK_S / 2)


def _measured(folder, mode):
    """The run's step over the simulated one's."""
    with Clock() as clock, mock.patch.object(paced, "time", clock), mock.patch.object(paced_run, "time", clock):
        (row,) = measure(Plan(PACE, (mode,), after=1), Path(folder), lambda text: None)
    return row.step_s / row.simulated.step_s


@pytest.mark.parametrize("mode", [(1, False, None), (2, True, None)])
def test_a_measured_run_with_servers_is_simulated_within_15_percent(ranks, tmp_path, mode):
    (ratio,) = ranks.run(_measured, tmp_path, mode, timeout_s=200)
    assert 0.85 < ratio < 1.15


def test_both_sides_of_a_balanced_run_take_as_long():
    pace = balanced(PACE)
    seconds = planned(pace, lengths_of(pace, 0), pace.train_token_s)
    assert sum(seconds.train) == pytest.approx(sum(map(sum, seconds.generate)) / PACE.servers)


def test_the_table_compares_with_the_first_mode_and_the_picture_is_one():
    modes = [(0, False, None), (1, False, None), (2, False, None), (2, True, None), (2, True, 1.5)]
    rows = [Row(mode, 4.0 / (1 + mode[0]), 1.0, simulated(balanced(PACE), mode, after=1)) for mode in modes]
    header, lines = table(rows)
    assert [line[header.index("times as fast as 0")] for line in lines] == ["1.00", "2.00", "3.00", "3.00", "3.00"]
    assert [line[0] for line in lines[2:]] == ["async_depth=2", "max_lag=2", "max_lag=2 oversample=1.5"]
    assert ElementTree.fromstring(picture(rows)).tag.endswith("svg")
