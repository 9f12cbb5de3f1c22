"""What whole runs in the tests share: a tiny model with its data, settings, a reward, and what a run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.run.metrics_file import read_metrics
from tests.tiny_models import EXPERTS, SIZES, save_character_tokenizer, save_model

TIMES = (
    "time/",
    "tokens_per_second",
    "tflops/",
    "mfu",
    "memory/",
    "rollout/idle_fraction",
    "rollout/tokens_per_second",
    "rollout/acceptance_rate",
    "rollout/accepted_fraction",
    "rollout/refit_bytes",
    "servers/",
)

IN_THE_THIRD_STEP = 3
"""Of a run of ``settings``: an epoch ends within it, and a checkpoint of the second is there."""


class Parity:
    """Half a point for an even sum of token ids, half for one that is divisible by three: a random model has both."""

    kind = name = "parity"
    in_process = True

    def __init__(self, run_dir: Path | None = None, stop_in_step: int | None = None) -> None:
        """In the middle of that step's rollout, which begins after the validation of the step before, SIGTERM comes."""
        self.run_dir, self.stop_in_step, self.calls = run_dir, stop_in_step, 0

    def __call__(self, prompt, text, completion):
        if self.run_dir and self.stop_in_step and validated(self.run_dir) == self.stop_in_step - 1:
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        total = int(completion.token_ids.sum())
        return 0.5 * (total % 2 == 0) + 0.5 * (total % 3 == 0)

    def check_answer(self, answer): ...

    def load(self): ...


def validated(run_dir: Path) -> int | None:
    """The step after which weights were validated, if that is the last that the run has logged."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return last["step"] if "validation/accuracy_greedy" in last else None


def run(overrides, stop_in_step=None, own_reward=True):
    """One rank of a whole run."""
    from nemo_aapo import RewardRunner, load_config, train

    config, parts = load_config(overrides), {}
    if own_reward:
        reward = Parity(Path(config.run.dir), stop_in_step)
        parts["rewards"] = RewardRunner([(reward, 1.0)], workers=0, timeout_s=10.0)
    return train(config, **parts)


def make_input(folder: Path, experts: bool = False) -> Path:
    """A random two-layer model and ten prompts, so that an epoch ends in the middle of the third step."""
    from transformers import Qwen2Config, Qwen3MoeConfig

    sizes = {**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True}
    config = Qwen3MoeConfig(**sizes, **EXPERTS, head_dim=16) if experts else Qwen2Config(**sizes)
    save_model(config, folder / "model")
    save_character_tokenizer(folder / "model")
    for name, first, count in (("train", 10, 10), ("validation", 60, 6)):
        rows = [{"question": f"{n}+{n + 1}=", "answer": str(2 * n + 1)} for n in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder, run_dir, *more, tp=1, pp=1, world=1):
    return [
        f"model.path={folder}/model",
        f"data.train={folder}/train.jsonl",
        f"data.validation={folder}/validation.jsonl",
        f"run.dir={run_dir}",
        f"trainer.devices={world}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
        "trainer.distributed_timeout_s=60",
        "checkpoint.save_interval=2",
        "prompts_per_step=4",
        "group_size=4",
        "max_tokens_per_microbatch=96",
        "rollout.max_new_tokens=8",
        "rollout.max_concurrent_tokens=512",
        "data.max_prompt_tokens=16",
        "model.optim.lr=1e-3",
        "model.optim.eps=1e-4",
        "rewards=[{name: parity, weight: 1.0}]",
        "validation.reward=parity",
        "validation.samples=2",
        "exp_manager.create_tensorboard_logger=false",
        *more,
    ]


def metrics(run_dir, timeless=True):
    """The records of a run, which may be writing the next one; none yet if it has not begun."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return [{k: v for k, v in line.items() if not (timeless and k.startswith(TIMES))} for line in lines]


@contextlib.contextmanager
def killed_after(records, run_dir, pid):
    """Inside, another process is killed as soon as the run has so many records of metrics.

    Raises:
        AssertionError: the run has ended before.
    """
    over = threading.Event()

    def kill():
        while len(metrics(run_dir)) < records:
            assert not over.wait(0.01), f"{run_dir} had no {records} records to kill process {pid} after"
        os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        try:
            yield
        finally:
            over.set()
        killing.result()


def exported(run_dir):
    return (Path(run_dir) / "hf_model" / "model.safetensors").read_bytes()


def kept(run_dir):
    """All that was kept of the training steps but the times, as plain numbers and texts."""
    from safetensors.numpy import load_file

    rows, tokens = {}, {}
    for path in sorted((run_dir / "rollouts").glob("train_*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows[path.stem] = [{key: value for key, value in line.items() if key != "time"} for line in lines]
        tokens[path.stem] = {k: v.tolist() for k, v in load_file(path.with_suffix(".safetensors")).items()}
    return rows, tokens


def assert_same_run(run_dir, other):
    from safetensors.numpy import load_file

    for line, expected in zip(metrics(run_dir), metrics(other), strict=True):
        assert line["step"] == expected["step"]
        for key in set(expected) & {"reward/mean", "loss", "grad_norm", "entropy", "validation/accuracy_sampled"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    weights, expected = (load_file(Path(d) / "hf_model" / "model.safetensors") for d in (run_dir, other))
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-5, err_msg=name)
