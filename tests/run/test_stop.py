"""Stopping a run at the end of a step: signals, the second Ctrl-C, the stop file."""

from __future__ import annotations

import os
import signal

import pytest

from nemo_aapo.errors import Interrupted
from nemo_aapo.run.stop import SIGNALS, StopSignal, heed


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_ends_nothing(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == signal.Signals(number).name
        assert "finishing this step, then saving" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_the_second_ctrl_c_stops_at_once_but_a_second_term_does_not(capfd):
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert "Ctrl-C once more" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_the_end_of_the_time_asks_and_whoever_waits_is_broken_off_once_its_patience_is_over(capfd):
    heed("anything")  # outside of a run nothing is broken off
    with StopSignal(limit_s=1e9) as stop:
        assert not stop.requested
        heed("anything", 0.0)
    with StopSignal(limit_s=0.0) as stop:
        heed("servers", 60.0)
        with pytest.raises(Interrupted, match=r"checkpoint\.max_time_s came while waiting for servers"):
            heed("servers", 0.0)
        assert stop.reason == "checkpoint.max_time_s"
    assert capfd.readouterr().err.count("0 s are over (checkpoint.max_time_s)") == 1


def test_the_stop_file_asks_as_well_and_silent_ranks_say_nothing(tmp_path, capfd):
    with StopSignal(tmp_path, speak=False) as stop:
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
        (tmp_path / "stop").unlink()
        assert stop.requested
    assert capfd.readouterr().err == ""
