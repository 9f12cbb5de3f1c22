"""The two lines of Megatron compute the same bits, and each goes on with what the other has written.

They are two environments: whole runs of each are compared, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemo_aapo import lines
from tests.lines.directories import NAMES
from tests.training_runs import TIMES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
"""Of one process, on a machine that is busy with other tests."""


def python_of(line: lines.Line) -> str:
    """The interpreter of a line's environment; skips the test where there is none."""
    if line is lines.installed():
        return sys.executable
    python = ROOT / line.environment / "bin" / "python"
    if not (python.parent.parent / "environment.stamp").exists():
        pytest.skip(f"no {line.environment}: bash scripts/environment.sh --line {line.name}")
    return str(python)


def call(line: lines.Line, *words: str) -> str:
    """Output of a command in a line's environment, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python_of(line), *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The quickstart's base model and data."""
    for line in lines.LINES.values():
        python_of(line)
    path = tmp_path_factory.mktemp("quickstart") / "base"
    call(lines.TRTLLM, "scripts/make_base_model.py", "--out", str(path))
    return path


def train(line: lines.Line, base: Path, run_dir: Path, steps: int) -> None:
    call(
        line,
        *("scripts/train.py", "experiment=quickstart", f"model.path={base}", f"run.dir={run_dir}"),
        *(f"data.{name}={base}/data/{name}.jsonl" for name in ("train", "validation")),
        *(f"trainer.max_steps={steps}", "trainer.val_check_interval=10"),
    )


def left_by(run_dir: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The metrics of a run that do not measure time or memory, and the weights of its exported model."""
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in logged]
    (exported,) = run_dir.glob("**/model.safetensors")
    return metrics, load_file(exported)


def test_the_quickstart_is_the_same_to_the_bit_and_goes_on_on_the_other_line(base, tmp_path):
    trtllm, newest = lines.TRTLLM, lines.NEWEST
    runs = {"trtllm": (trtllm, trtllm), "newest": (newest, newest), "there": (trtllm, newest), "back": (newest, trtllm)}

    def whole(name: str) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
        first, second = runs[name]
        if first is not second:
            train(first, base, tmp_path / name, steps=10)
        train(second, base, tmp_path / name, steps=20)
        return left_by(tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        metrics, weights = zip(*pool.map(whole, runs), strict=True)
    assert len(metrics[0]) == 20 + 3  # and validations before the first step, after the tenth and the last
    assert any(line["grad_norm"] > 0 for line in metrics[0] if "grad_norm" in line)
    for other in metrics[1:]:
        assert other == metrics[0]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(np.array_equal(other[name], weights[0][name]) for name in other)


def test_directories_of_both_transformers_are_the_same_models_in_both_lines_and_are_exported_as_they_were(tmp_path):
    folders = {line.name: tmp_path / line.name for line in lines.LINES.values()}
    for line in lines.LINES.values():
        call(line, "-m", "tests.lines.directories", "write", str(folders[line.name]))
    first, *others = folders.values()
    for name in NAMES:  # transformers 5 holds experts otherwise in memory, and so draws others
        for other in others:
            shutil.copy(first / name / "model.safetensors", other / name)
    both = []
    for line in lines.LINES.values():
        out = str(tmp_path / f"exports_of_{line.name}")
        said = call(line, "-m", "tests.lines.directories", "read", *map(str, folders.values()), out)
        both.append(json.loads(said.splitlines()[-1]))
    assert both[0] == both[1]
    for name in NAMES:
        old, new = (both[0][f"{folder}/{name}"] for folder in folders)
        assert {**old, "as it was": None} == {**new, "as it was": None}
        for folder in folders.values():
            files = sorted(file.name for file in (folder / name).iterdir())
            assert both[0][f"{folder.name}/{name}"]["as it was"] == files
