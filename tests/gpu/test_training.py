"""Whole runs on a GPU: trained, stopped, resumed, exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import make_input, metrics, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("gpu_training"))


def train(folder, run_dir, *more):
    """A run by the script, as a user starts it; integers as answers, since a script takes no reward of a test."""
    length = "{name: cosine, weight: 0.5, max_tokens: 8}"
    rewards = (f"rewards=[{{name: integer, weight: 1.0}}, {length}]", "validation.reward=integer")
    command = [sys.executable, "-W", "ignore", "scripts/train.py", *settings(folder, run_dir, *rewards, *more)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


RUNS = {
    "bf16": ("precision=bf16",),
    "fp8_tensorwise": ("precision=fp8_tensorwise", "rollout.max_parity_error=2", "rollout.max_gen_kl=1"),
    "lent_memory": ("precision=bf16", "rollout.offload_learner=true"),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_stopped_run_is_saved_resumed_and_exported(folder, name):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    more, whole, parts = RUNS[name], folder / f"{name}_whole", folder / f"{name}_parts"
    train(folder, whole, *more)
    train(folder, parts, *more, "trainer.max_steps=4", "export_hf_model=false")
    train(folder, parts, *more)
    assert [line["step"] for line in metrics(parts)] == [line["step"] for line in metrics(whole)]
    found, expected = (load_file(run / "hf_model" / "model.safetensors") for run in (parts, whole))
    assert found.keys() == expected.keys()
    differences = [float((found[key].float() - expected[key].float()).abs().max()) for key in expected]
    print(f"FIGURES resumed {name} {max(differences)}")
    assert max(differences) < 2e-2
    AutoModelForCausalLM.from_pretrained(parts / "hf_model")
