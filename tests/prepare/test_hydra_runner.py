"""A script of a user's own, decorated as NeMo's scripts are, hands what it composed to the same ``prepare``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_empty_input

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"""
from nemo_aapo.utils.libraries import import_nemo

import_nemo()  # NeMo without its noise
from nemo.core.config import hydra_runner
from nemo_aapo.prepare import prepare_tree


@hydra_runner(config_path={str(ROOT / "conf")!r}, config_name="train_aapo")
def main(cfg):
    job = prepare_tree(cfg)
    print(job.config.algorithm.name, job.config.precision.name, job.sizes.completions_per_step, job.rewards[0][0].name)


main()
"""


def test_a_tree_that_hydra_runner_composed_becomes_a_job(tmp_path):
    words = [*save_empty_input(tmp_path), "algorithm=gpg", "prompts_per_step=${multiply:2,3}", "group_size=2"]
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "mine.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "gpg fp32 12 accuracy"
