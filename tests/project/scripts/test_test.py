"""scripts/test.sh runs every test in one of its lanes, and fails if any of them does.

It runs on a copy of the checkout, with a Python that only writes down what it is asked to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time

import psutil
import pytest

from tests.project.scripts.conftest import ROOT, WAIT_S

pytestmark = pytest.mark.slow


def test_peers_that_cannot_be_installed_are_named_and_do_not_stop_the_tests(tested):
    status, output, _ = tested.run("test.sh", REFUSE="requirements/peers.txt")
    assert status == 0, output
    assert "pip could not install requirements/peers.txt" in output
    assert "going on without .venv-peers" in output
    assert not (tested.root / ".venv-peers").exists()
    assert tested.run("peers.sh", REFUSE="requirements/peers.txt")[0] != 0


def test_every_test_runs_once_in_one_of_the_lanes_and_numbers_and_ranks_once_more(tested):
    status, output, calls = tested.run("test.sh")
    assert status == 0, output
    chosen = [call.partition("--durations-min=1 ")[2].replace("\\", "") for call in calls if "-m pytest" in call]
    rest = "-m not slurm and not unit and not peers "
    [main] = [text for text in chosen if text.startswith(rest) and "--ignore" in text]
    left_out = re.findall(r"--ignore=(\S+)", main)
    beside = [text for text in chosen if text.startswith(rest) and text != main]
    assert sorted(" ".join(beside).replace(rest, "").split()) == sorted(left_out[1:])
    others = ["-m slurm", "-m peers", "-m unit", "-m exact and not slow", left_out[0], *beside]
    [both_lines] = [text for text in chosen if text.startswith("-m ranks and not once ")]
    assert sorted(chosen) == sorted([main, *others, both_lines])
    assert all((ROOT / path).exists() for path in (*left_out, *both_lines.split()[5:]))


LANES = ["-m unit", "-m slurm", "-m peers", "-m ranks", "exact and", "tests/training", "tests/conversion", "/lines"]


@pytest.mark.parametrize("refused", LANES)
def test_what_fails_in_any_lane_fails_the_tests(tested, refused):
    assert tested.run("test.sh", REFUSE=refused)[0] != 0


def test_a_second_line_that_cannot_be_made_fails_the_tests_unless_there_is_no_python_for_it(tested):
    status, output, calls = tested.run("test.sh", REFUSE="-m venv .venv-newest")
    assert status != 0
    assert any("-m slurm" in call for call in calls)
    for name in ("python3.12", "python3", "python"):
        (tested.bin / name).write_text("#!/usr/bin/env bash\nexit 127\n")
    shutil.rmtree(tested.root / ".venv-newest", ignore_errors=True)
    status, output, calls = tested.run("test.sh")
    assert status == 0, output
    assert "going on without .venv-newest" in output
    assert not any("tests/lines" in call and "--ignore" not in call for call in calls)


def assert_ended(process):
    """The script that led this session, and all that it started."""
    process.communicate(timeout=WAIT_S)
    end = time.monotonic() + WAIT_S
    while left := [found for found in psutil.process_iter() if session_of(found) == process.pid]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def session_of(process):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_lanes(tested, number):
    process = tested.start("test.sh", SLOW="pytest", SECONDS_SLOW="600")
    for lane in ("-m unit", "-m slurm", "--ignore="):
        tested.wait_for(lane)
    os.killpg(process.pid, number)
    assert_ended(process)
    assert not any("exact and" in call for call in tested.calls())


def test_a_fault_of_style_leaves_nothing_behind(tested):
    (tested.root / ".venv" / "bin" / "mypy").write_text('#!/usr/bin/env bash\necho mypy >>"$CALLS"\nsleep 600\n')
    process = tested.start("test.sh", REFUSE="check .")
    assert_ended(process)
    assert process.returncode == 1
    assert "mypy" in tested.calls()


def test_the_quick_tests_install_nothing_else_and_style_and_tests_can_each_fail(tested):
    status, output, calls = tested.run("test.sh", "--quick", "-x")
    assert status == 0, output
    [pytest_call] = [call for call in calls if "-m pytest" in call]
    assert pytest_call.endswith("-m unit --numprocesses 2 -x")
    assert {*calls} - {pytest_call} == {"check .", "format --check ."}
    for refused in ("check .", "-m pytest"):
        assert tested.run("test.sh", "--quick", REFUSE=refused)[0] != 0


def test_a_wrong_type_fails_the_tests_and_is_shown(tested):
    (tested.root / ".venv" / "bin" / "mypy").write_text("#!/usr/bin/env bash\necho 'error: a type'; exit 1\n")
    status, output, _ = tested.run("test.sh", "-x")
    assert status == 1
    assert "error: a type" in output
