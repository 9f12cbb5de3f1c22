"""A short run of TRL's GRPOTrainer on given completions and rewards; writes down what it computed.

    python -m tests.peers.trl_run INPUT.json OUTPUT.npz        with .venv-peers on PYTHONPATH

Nothing of TRL is replaced. Its hooks give the completions (``rollout_func``) and the rewards (a reward function); its
own training loop scores them, makes the advantages, splits the batch over two accumulation steps, and does two updates
on it. The subclass and the callback only write down what passes.

For each case the output has ``CASE/advantages`` [S], in the order of the completions, and for the updates u = 0, 1:
``CASE/u/weights`` and ``CASE/u/gradient`` (all parameters, flat) and ``CASE/u/loss`` (summed over accumulation steps).
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Recorder(TrainerCallback):
    """Weights before and gradients of each update."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, *, model, **kwargs) -> None:
        self.weights.append(parameters_to_vector(model.parameters()).detach().clone())

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs) -> None:
        self.gradients.append(parameters_to_vector([p.grad for p in model.parameters()]).clone())


class RecordedTrainer(GRPOTrainer):
    """GRPOTrainer that keeps its losses and advantages."""

    losses: list[float]
    advantages: torch.Tensor

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.advantages = output["advantages"]
        return output


def run_case(given: dict[str, Any], case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Two updates on one batch under the case's settings."""
    model = AutoModelForCausalLM.from_pretrained(given["reference"], dtype=torch.float64)  # TRL loads it again for KL
    policy = AutoModelForCausalLM.from_pretrained(given["policy"], dtype=torch.float64)
    model.load_state_dict(policy.state_dict())
    samples = len(given["completions"])

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        assert prompts == given["prompts"]  # one for each completion
        return {
            "prompt_ids": given["prompt_ids"],
            "completion_ids": given["completions"],
            "logprobs": given["rollout_logprobs"],
        }

    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecordedTrainer(
            model,
            reward_funcs=lambda completion_ids, **_: given["rewards"],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                num_generations=given["group_size"],
                per_device_train_batch_size=samples // 2,
                gradient_accumulation_steps=2,
                max_steps=2,
                num_iterations=2,
                shuffle_dataset=False,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                temperature=given["temperature"],
                max_completion_length=given["max_completion_length"],
                **case["arguments"],
            ),
            train_dataset=Dataset.from_dict({"prompt": list(dict.fromkeys(given["prompts"]))}),
            processing_class=AutoTokenizer.from_pretrained(given["policy"]),
            callbacks=[recorder],
            optimizers=(torch.optim.SGD(model.parameters(), lr=case["lr"]), None),
            rollout_func=rollout,
        )
        if case["importance_weight"]:
            trainer.use_vllm = True  # turns the correction on; set in __init__ it would start the engine, too
            trainer._last_loaded_step = 0  # and no engine waits for weights
        trainer.losses = []
        trainer.train()
    results = {"advantages": trainer.advantages}
    for update in range(2):
        results[f"{update}/weights"] = recorder.weights[update]
        results[f"{update}/gradient"] = recorder.gradients[update]
        results[f"{update}/loss"] = torch.tensor(sum(trainer.losses[2 * update : 2 * update + 2]), dtype=torch.float64)
    return {f"{case['name']}/{key}": value.numpy() for key, value in results.items()}


def main(input_path: str, output_path: str) -> None:
    with open(input_path) as file:
        given = json.load(file)
    results: dict[str, np.ndarray] = {}
    for case in given["cases"]:
        results |= run_case(given, case)
    np.savez(output_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
