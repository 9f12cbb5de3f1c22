"""Whole runs on a GPU: trained, stopped, resumed, exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.training_runs import make_input, metrics, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("gpu_training"))


def train(folder, run_dir, *more):
    """A run by the script, as a user starts it; integers as answers, since a script takes no reward of a test."""
    rewards = ("rewards=[{name: integer, weight: 1.0}, {name: cosine, weight: 0.5}]", "validation.reward=integer")
    command = [sys.executable, "-W", "ignore", "scripts/train.py", *settings(folder, run_dir, *rewards, *more)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


PRECISIONS = {
    "bf16": (),
    "fp8_tensorwise": ("rollout.max_parity_error=2", "rollout.max_gen_kl=1"),
    "bf16, lent memory": ("rollout.offload_learner=true",),
}


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_a_stopped_run_is_saved_resumed_and_exported(folder, name):
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    more = (f"precision={name.partition(',')[0]}", *PRECISIONS[name])
    whole, parts = folder / f"{name} whole", folder / f"{name} parts"
    train(folder, whole, *more)
    train(folder, parts, *more, "trainer.max_steps=3", "export_hf_model=false")
    train(folder, parts, *more)
    assert [line["step"] for line in metrics(parts)] == [line["step"] for line in metrics(whole)]
    found, expected = (load_file(run / "hf_model" / "model.safetensors") for run in (parts, whole))
    differences = [np.abs(found[key].astype(np.float32) - expected[key].astype(np.float32)).max() for key in expected]
    print(f"FIGURES resumed {name} {max(differences)}")
    assert max(differences) < 2e-2
    AutoModelForCausalLM.from_pretrained(parts / "hf_model")
