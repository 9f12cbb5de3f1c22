"""Jobs in the background that may fail: what they cost the run."""

from __future__ import annotations

import threading
import time

import pytest

from nemo_aapo.utils import background
from nemo_aapo.utils.background import BestEffort


def fail():
    raise OSError("No space left on device")


@pytest.mark.timeout(60)
def test_a_job_that_hangs_costs_one_wait_and_what_comes_meanwhile_and_no_run(monkeypatch):
    monkeypatch.setattr(background, "BEST_EFFORT_S", 0.5)
    answers, notes, written = threading.Event(), [], []
    jobs = BestEffort("rollouts", notes.append)
    jobs.start("step 1", answers.wait)
    began = time.monotonic()
    jobs.start("step 2", lambda: written.append(2))
    monkeypatch.setattr(background, "BEST_EFFORT_S", 1e9)
    jobs.start("step 3", lambda: written.append(3))
    jobs.wait()
    assert time.monotonic() - began >= 0.5
    (note,) = notes
    assert note == (
        "warning: step 1 could not be written: rollouts: not written within 0.5 s; does the disk still answer? "
        "What comes meanwhile is left out"
    )
    answers.set()
    while jobs.busy():
        time.sleep(0.01)
    jobs.start("step 4", lambda: written.append(4))
    jobs.start("step 5", fail)
    jobs.start("step 6", lambda: written.append(6))
    jobs.wait()
    assert written == [4, 6]
    assert notes[1:] == ["warning: step 5 could not be written: No space left on device"]
