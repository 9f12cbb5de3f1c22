"""One of our contestants: ``python -m benchmarks.peers.our_side SPEC.json``, orders on standard input."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import plan as settings
from benchmarks.peers.orders import Orders, peak_bytes
from benchmarks.workload import Silent
from nemo_aapo.algorithms import ScoredGroups
from nemo_aapo.errors import RunError
from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Group, Prompt


class CoinToss(Reward):
    """``plan.reward`` in the form of our rewards."""

    kind = "coin_toss"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return settings.reward(completion.token_ids)


class LastStep(Silent):
    """The trainer's reporter: keeps the metrics of the last step."""

    metrics: dict[str, float]

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics = metrics


def overrides(spec: dict[str, Any]) -> list[str]:
    """A contestant's settings."""
    plan = settings.Plan(**spec["plan"])
    return [
        *settings.OURS[spec["name"]],
        f"run.dir={spec['folder']}",
        f"model.path={spec['model']}",
        f"data.train={spec['prompts']}",
        f"data.validation={spec['prompts']}",
        f"data.max_prompt_tokens={plan.prompt_tokens}",
        "data.shuffle=false",
        f"prompts_per_step={plan.prompts_per_step}",
        f"group_size={plan.group_size}",
        f"max_tokens_per_microbatch={plan.tokens}",  # in one piece, as TRL
        f"rollout.max_new_tokens={plan.new_tokens}",
        f"rollout.max_concurrent_tokens={plan.tokens}",
        f"model.optim.lr={settings.LEARNING_RATE}",
        f"model.optim.clip_grad={settings.MAX_GRADIENT_NORM}",
        f"trainer.max_steps={settings.STEPS_AT_MOST}",
        "trainer.devices=1",
    ]


def agree(trainer: Any, recorded: dict[str, Any]) -> dict[str, float]:
    """Train once on TRL's completions; the differences of its log-probs, loss and gradient norm from ours."""
    prompts = {tuple(prompt.token_ids.tolist()): prompt for prompt in trainer.rollouts.data}
    size = trainer.config.group_size
    groups = []
    for first in range(0, len(recorded["completions"]), size):
        rows = range(first, first + size)
        if tuple(recorded["prompts"][first]) not in prompts:
            raise RunError(f"TRL's prompt is none of ours: {recorded['prompts'][first]}; does the chat template agree?")
        completions = [
            Completion(
                np.array(recorded["completions"][i], np.int32),
                np.array(recorded["logprobs"][i], np.float32),
                "length",
                trainer.policy.version,
            )
            for i in rows
        ]
        rewards = np.array([settings.reward(completion.token_ids) for completion in completions])
        groups.append(
            Group(
                prompt=prompts[tuple(recorded["prompts"][first])],
                completions=tuple(completions),
                texts=("",) * size,
                rewards=rewards,
                reward_parts={"coin_toss": rewards},
                failed=np.zeros(size, bool),
                advantages=trainer.objective.advantages(ScoredGroups(rewards[None]))[0],
            )
        )
    # exp of the mean absolute difference of the log-probs
    logprobs = math.log(trainer.learner.parity(groups)["parity/mult_prob_error"])
    metrics = trainer.learner.update(groups)
    trainer.rollouts.refit()
    return {
        "logprobs": logprobs,
        "loss": metrics["loss"],
        "trl_loss": recorded["loss"],
        "gradient_norm": metrics["grad_norm"],
        "trl_gradient_norm": recorded["gradient_norm"],
    }


def take_step(trainer: Any, reporter: LastStep, drawn: list[list[int]], orders: Orders) -> None:
    """Take one training step, and answer with its cost."""
    drawn.clear()
    trainer.train_step()
    metrics = reporter.metrics
    seconds = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    phases = {key: seconds[key] for key in ("rollout", "reference", "train", "refit")}
    orders.answer_step(
        lengths=drawn[0],  # the policy's come first in a step
        reference_tokens=sum(map(sum, drawn[1:])),
        loss=metrics["loss"],
        phases={**phases, "score": seconds["step"] - sum(phases.values())},
    )


def build(spec: dict[str, Any], reporter: LastStep, stack: contextlib.ExitStack) -> Any:
    """The trainer of a contestant."""
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.training.build import build_training, initialize

    job = resolve(load_config(overrides(spec)), 1, given=("rewards",))
    initialize(job.config)
    rewards = RewardRunner([(CoinToss(), 1.0)], workers=0, timeout_s=10.0)
    trainer = build_training(job, reporter=reporter, stack=stack, rewards=rewards)
    stack.callback(trainer.kept.wait)  # what still writes to the folder, which goes
    return trainer


def count_tokens(engine: Any, drawn: list[list[int]]) -> None:
    """Have the engine append the lengths of the completions of each of its calls to the list."""
    generate = engine.generate

    def counted(*arguments: Any) -> list[list[Completion]]:
        completions = generate(*arguments)
        drawn.append([len(completion.token_ids) for row in completions for completion in row])
        return completions

    engine.generate = counted


def main(path: str) -> None:
    """One contestant: ours, step by step as the orders come in."""
    orders = Orders()

    import torch

    from nemo_aapo.utils.libraries import quiet

    quiet()
    torch.set_num_threads(1)
    reporter = LastStep()
    drawn: list[list[int]] = []
    with contextlib.ExitStack() as stack:
        trainer = build(json.loads(Path(path).read_text()), reporter, stack)
        count_tokens(trainer.rollouts.collector.engine, drawn)
        began = time.process_time()
        trainer.rollouts.fill_reference(0, lambda done, total: None, lambda: False)
        orders.answer(fill_cpu=time.process_time() - began)
        while (order := orders.next()) is not None:
            torch.set_num_threads(order.get("threads", 1))
            if order["do"] == "step":
                take_step(trainer, reporter, drawn, orders)
            elif order["do"] == "agree":
                orders.answer(**agree(trainer, json.loads(Path(order["file"]).read_text())))
            else:
                orders.answer(peak_bytes=peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
