"""Trackers get completions as a table and the page as an artifact; what they refuse is a line, and ends no run."""

from __future__ import annotations

import json

import pytest

from nemo_aapo.report.trackers import COLUMNS, ROWS, Trackers

pytestmark = pytest.mark.slow

SAMPLES = [
    {
        "prompt": f"{i}",
        "completion": "\ud800 x",
        "answer": "4",
        "reward": float("nan"),
        "tokens": 3,
        "source": "s",
        "finish_reason": "stop",
    }
    for i in range(200)
]


def test_mlflow_keeps_the_table_and_the_page(tmp_path):
    pytest.importorskip("mlflow", reason="not installed: requirements/mlflow.txt")
    from lightning.pytorch.loggers import MLFlowLogger

    logger, notes, page = MLFlowLogger("e", tracking_uri=f"file:{tmp_path}/mlruns"), [], tmp_path / "report.html"
    page.write_text("<p>")
    trackers = Trackers([logger], notes.append)
    trackers.completions(50, SAMPLES)
    trackers.page(page)
    assert notes == []
    (table,) = tmp_path.glob("mlruns/**/artifacts/completions/step_000050.json")
    written = json.loads(table.read_text())
    assert written["columns"] == list(COLUMNS)
    assert 32 <= len(written["data"]) <= ROWS
    assert written["data"][0][1:4] == ["\ud800 x", "4", None]
    assert len(list(tmp_path.glob("mlruns/**/artifacts/report.html"))) == 1


def test_weights_and_biases_keeps_the_table_and_the_page(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="not installed: requirements/wandb.txt")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, notes, page = WandbLogger(save_dir=tmp_path, offline=True), [], tmp_path / "report.html"
    page.write_text("<p>")
    trackers = Trackers([logger], notes.append)
    trackers.completions(50, SAMPLES)
    trackers.page(page)
    assert notes == []
    wandb.finish()
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/validation/completions*.json")
    assert json.loads(table.read_text())["columns"] == list(COLUMNS)


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
