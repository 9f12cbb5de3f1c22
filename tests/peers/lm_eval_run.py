"""Evaluates a model directory by lm-evaluation-harness on one local task, and prints its scores as JSON.

    python -m tests.peers.lm_eval_run MODEL_DIR TASK_DIR        with .venv-peers on PYTHONPATH

The last line of the output is ``{"acc": ..., "loglikelihoods": [[one a choice], ...]}``.
"""

from __future__ import annotations

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(model: str, tasks: str) -> None:
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "device": "cpu", "dtype": "float32"},
        tasks=["tiny_sums"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        batch_size=1,
        log_samples=True,
    )
    samples = sorted(results["samples"]["tiny_sums"], key=lambda sample: sample["doc_id"])
    loglikelihoods = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    print(json.dumps({"acc": results["results"]["tiny_sums"]["acc,none"], "loglikelihoods": loglikelihoods}))


if __name__ == "__main__":
    main(*sys.argv[1:])
