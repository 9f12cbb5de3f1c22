"""Run directories as a run leaves them, written by what a run writes them with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

from nemo_aapo.rollout.saved.kept import KeptFiles, KeptGroup
from nemo_aapo.trace.file import Part, trace_of
from nemo_aapo.trace.spans import Span
from nemo_aapo.utils.files import to_json, write_atomic

ROOT = Path(__file__).resolve().parents[2]


def make_run(
    directory: Path, steps: int = 40, *, length: int = 60, seed: int = 1, lr: float = 1e-6, text=None, **curves
):
    """A run that learns, of which nothing is to be complained.

    Args:
        length: characters of each of its completions.
        text: hostile text, in place of whatever a model, a data set or a reward can decide.
        curves: metric (``_`` for ``/`` where it is the first) -> its value as a function of the share of the run done.
    """
    tree = yaml.safe_load((ROOT / "conf" / "train_aapo.yaml").read_text())
    tree.pop("defaults")
    tree["run"], tree["seed"], tree["model"]["optim"]["lr"] = {"name": "run", "dir": str(directory)}, seed, lr
    tree["trainer"] |= {"max_steps": steps, "num_nodes": 1, "devices": 1}
    tree["validation"]["reward"] = "math"
    directory.mkdir(parents=True)
    write_atomic(directory / "config.yaml", yaml.safe_dump(tree))
    start = {
        "time": "2026-01-01T00:00:00+00:00",
        "host": text or "node1",
        "world_size": 1,
        "versions": {"torch": "2.13"},
    }
    write_atomic(directory / "run.json", to_json({"id": "0", "digest": "0", "settings": {}, "starts": [start]}))
    curves = {name.replace("_", "/", 1) if name.split("_")[0] in SECTIONS else name: c for name, c in curves.items()}
    lines = [validation(0, curves, 0.0)]
    for step in range(1, steps + 1):
        done = step / steps
        lines.append(
            {
                "step": step,
                **{
                    name: curve(done)
                    for name, curve in {**CURVES, **curves}.items()
                    if not name.startswith("validation/")
                },
            }
        )
        if step % max(1, steps // 4) == 0:
            lines.append(validation(step, curves, done))
    write_atomic(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rollouts = directory / "rollouts"
    keep = KeptFiles(rollouts, 10**9, lambda ids: "ab "[int(ids[0])])
    for step in range(1, steps + 1):
        keep.write(step, [kept_group(step, length, text)])
    for step in range(0, steps + 1, max(1, steps // 4)):
        rows = [validation_row(prompt, sample, step / steps, text) for prompt in range(8) for sample in range(3)]
        write_atomic(rollouts / f"step_{step:06d}.jsonl", "".join(to_json(row) + "\n" for row in rows))
    return directory


SECTIONS = ("reward", "groups", "margin", "time", "parity", "validation", "rollout", "advantage")
CURVES = {
    "reward/mean": lambda done: 0.3 + 0.5 * done,
    "reference_reward/mean": lambda done: 0.3,
    "reward/failed_fraction": lambda done: 0.0,
    "loss": lambda done: -0.1,
    "grad_norm": lambda done: 1.0 + 0.3 * math.sin(40 * done),
    "lr": lambda done: 1e-6,
    "entropy": lambda done: 0.6 - 0.4 * done,
    "negative_advantage_logprob": lambda done: -9.0,
    "parity/mult_prob_error": lambda done: 1.001,
    "parity/gen_kl": lambda done: 1e-5,
    "truncated_fraction": lambda done: 0.02,
    "completion_length/mean": lambda done: 60.0,
    "completion_length/max": lambda done: 90.0,
    "groups/zero_std": lambda done: 0.3,
    "groups/zero_advantage": lambda done: 0.05,
    "groups/all_right": lambda done: 0.2,
    "groups/all_wrong": lambda done: 0.1,
    "groups/failed": lambda done: 0.0,
    "margin/abs_mean": lambda done: 0.15,
    "margin/at_bound": lambda done: 0.1,
    "advantage/abs_mean": lambda done: 0.8,
    "advantage/group_abs_mean": lambda done: 0.7,
    "rollout/idle_fraction": lambda done: 0.3,
    "rollout/lag": lambda done: 0.0,
    "padding_fraction": lambda done: 0.05,
    "tokens_per_second": lambda done: 1000.0,
    "time/rollout": lambda done: 3.0,
    "time/reward": lambda done: 0.1,
    "time/reference": lambda done: 0.0,
    "time/train": lambda done: 4.0,
    "time/refit": lambda done: 0.2,
    "time/step": lambda done: 7.5,
}


def validation(step, curves, done):
    accuracy = curves.get("validation/accuracy", lambda done: 0.3 + 0.4 * done)(done)
    return {
        "step": step,
        "validation/accuracy_greedy": accuracy,
        "validation/accuracy_sampled": accuracy,
        "validation/accuracy_sampled_stderr": 0.01,
    }


def row(prompt: str, completion: str, reward: float, text) -> dict:
    return {
        "prompt": text or prompt,
        "completion": completion,
        "reward": reward,
        "reward_parts": {text or "math": reward},
        "answer": text or "42",
        "finish_reason": "stop",
        "tokens": 3,
        "source": text or f"data.jsonl:{prompt}",
    }


def validation_row(prompt: int, sample: int, done: float, text) -> dict:
    return row(f"{prompt}", text or f"answer {sample}", float((prompt + sample) % 4 < 4 * done), text)


def kept_group(step: int, length: int, text) -> KeptGroup:
    rows, tokens = [], []
    for i in range(2):
        completion = text or (f"step {step} " + "ab " * (length // 3))[:length]
        more = {
            "step": step,
            "group": 3,
            "sample": i,
            "failed": False,
            "prompt_id": "x",
            "reference_rewards": [0.0, 1.0],
        }
        numbers = {"group_advantage": 0.5 - i, "margin": 0.1, "advantage": 0.6 - i, "policy_version": step - 1}
        rows.append({**row(f"prompt {step}", completion, 1.0 - i, text), **more, **numbers})
        ids = np.arange(length) % 3
        figures = {name: np.full(length, -0.5, np.float32) for name in ("logprobs", "learner_logprobs", "entropy")}
        tokens.append({"token_ids": ids.astype(np.int32), **figures})
    return KeptGroup(rows, tokens)


def make_trace(directory: Path, step: int, name: str = "rollout", ranks: int = 2) -> None:
    """A trace of a step of a run: phases, micro-batches and collectives of each rank, scores, and a server.

    Args:
        name: of a phase; may be hostile.
    """
    ms = 1_000_000
    parts = []
    for rank in range(ranks):

        def at(track, what, kind, start, end, process=f"rank {rank}"):
            return Span(process, track, what, kind, start * ms, end * ms, {})

        loop = [(f"step {step}", "step", 0, 1000), (name, "phase", 5, 600), ("train", "phase", 610, 980)]
        loop += [(f"forward {i}", "micro-batch", 610 + 90 * i, 645 + 90 * i) for i in range(4)]
        loop += [(f"backward {i}", "micro-batch", 650 + 90 * i, 695 + 90 * i) for i in range(4)]
        loop += [("wait for all_reduce", "wait", 655 + 90 * i, 668 + 90 * i) for i in range(4)]
        spans = [at("loop", *span) for span in loop]
        workers = f"reward workers of rank {rank}"
        spans += [at(f"worker {i % 2}", "score", "score", 200 + 40 * i, 238 + 40 * i, workers) for i in range(8)]
        if rank == 0:
            spans += [at("engine", "generate", "server", 20, 580, "rollout server 0")]
        parts.append(Part(rank, "node1", (0, 10), spans, [], 0))
    write_atomic(directory / "trace" / f"step_{step:06d}.json", json.dumps(trace_of(step, parts)))
