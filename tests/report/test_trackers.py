"""Trackers get completions as a table and the page as an artifact; what they refuse is a line, and ends no run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from nemo_aapo.report.trackers import COLUMNS, ROWS, Trackers
from tests.report.tracked import SAMPLES, STEP

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-trackers" / "bin" / "python"


@pytest.mark.slow
def test_weights_and_biases_and_mlflow_keep_the_table_and_the_page(tmp_path):
    """The real libraries, offline; what they will upload is read from their files."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-trackers: bash scripts/trackers.sh makes it, or says what is in the way")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    command = [PYTHON, "-W", "ignore", "-m", "tests.report.tracked", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["notes"] == []

    assert said["wandb"]["steps"] == [STEP]
    assert ["report", ["report.html"]] in said["wandb"]["artifacts"]
    (wandb_table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/validation/completions*.json")
    (mlflow_table,) = tmp_path.glob("mlruns/**/artifacts/completions/step_000050.json")
    for path in (wandb_table, mlflow_table):
        table = json.loads(path.read_text())
        assert table["columns"] == list(COLUMNS)
        assert 32 <= len(table["data"]) <= ROWS
        assert table["data"][0][1:4] == ["\ud800 x", "4", None]
    assert len(list(tmp_path.glob("mlruns/**/artifacts/report.html"))) == 1


@pytest.mark.unit
def test_a_tracker_that_refuses_is_a_warning(tmp_path):
    class WandbLogger:
        def log_table(self, **given):
            raise ConnectionError("no route\nto host")

    class TensorBoardLogger: ...

    notes = []
    trackers = Trackers([WandbLogger(), TensorBoardLogger()], notes.append)
    trackers.completions(1, SAMPLES)
    trackers.page(tmp_path / "never written")
    assert notes == ["warning: WandbLogger did not take what it was given: no route"]
