"""An error that nobody foresaw ends a command with a message, and its traceback is kept where the message says."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.cli import main as entry
from nemo_aapo.cli.main import exit_code, run_command
from nemo_aapo.errors import FAILED, REFUSED
from nemo_aapo.prepare import prepare, settings_of
from nemo_aapo.utils.job import STARTED, seconds_since_start, start_of_job, start_of_process
from tests.tiny_models import save_empty_input

ROOT = Path(__file__).resolve().parents[2]


def fail(error: BaseException):
    def task(*_: object) -> int:
        raise error

    return task


def test_what_nobody_foresaw_is_said_in_two_lines_and_its_traceback_is_kept_with_the_run(tmp_path, capsys):
    words = save_empty_input(tmp_path)
    run_dir = Path(words[3].removeprefix("run.dir="))
    run_dir.mkdir()
    code = run_command(
        lambda command: settings_of(command)[0], fail(ZeroDivisionError("by zero")), description="", words=words
    )
    assert code == FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "Traceback" not in said
    assert re.search(r"nobody foresaw, at nemo_aapo/cli/main\.py:\d+, in \S+: ZeroDivisionError: by zero", said)
    log = run_dir / "logs" / "error_rank_0.log"
    assert str(log) in said
    assert "Please report this" in said
    assert "Traceback (most recent call last)" in log.read_text()


def test_before_there_is_a_run_directory_the_traceback_is_kept_among_temporary_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_code(fail(KeyError("x"))) == FAILED
    (log,) = tmp_path.iterdir()
    assert str(log) in capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", str(log / "below_a_file"))
    assert exit_code(fail(KeyError("x"))) == FAILED  # nothing can be written: better on the console than nowhere
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/disk/x"), "/disk/x: No space left on device"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "max_concurrent_tokens"),
    ],
)
def test_what_the_machine_refuses_is_said_in_its_words_and_not_to_be_reported(tmp_path, capsys, error, said):
    assert exit_code(fail(error), run_dir=tmp_path) == FAILED
    told = capsys.readouterr().err
    assert said in told
    assert "report" not in told
    assert str(tmp_path / "logs" / "error_rank_0.log") in told


def test_a_reader_of_the_output_that_has_seen_enough_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert exit_code(fail(BrokenPipeError(32, "Broken pipe"))) == FAILED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "abc"}, "RANK='abc': a number is needed"),
        ({"RANK": "0"}, "RANK=0 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE='x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_ranks_that_cannot_find_each_other_are_refused_in_words(tmp_path, capsys, monkeypatch, variables, said):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(entry, "RANK_0_SPEAKS_S", 0.0)

    assert run_command(prepare, lambda job: 0, description="", words=save_empty_input(tmp_path)) == REFUSED
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_console_that_cannot_print_a_letter_gets_its_number_instead(tmp_path):
    words = [*save_empty_input(tmp_path), 'run.name="√"']
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nemo_aapo.cli", "train", *words, "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\\u221a" in done.stdout


def test_the_clock_of_a_run_starts_with_its_first_process_or_with_slurms_start_of_the_job(monkeypatch):
    for name in (STARTED, "SLURM_JOB_START_TIME"):
        monkeypatch.delenv(name, raising=False)
    own = start_of_process()
    assert 0 < seconds_since_start() < 36_000
    assert abs(start_of_process() - own) < 1
    assert abs(start_of_job() - own) < 1
    monkeypatch.setenv("SLURM_JOB_START_TIME", f"{own - 500:.0f}")
    assert abs(start_of_job() - (own - 500)) < 2
    assert abs(start_of_process() - own) < 1  # in an allocation, a run begins when it is started
    monkeypatch.setenv(STARTED, f"{own - 900:.3f}")
    assert 900 < seconds_since_start() < 37_000
