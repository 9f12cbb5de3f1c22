"""A trainer whose steps do the same work on every machine: random weights, fixed lengths, a signal in every group.

The sampled tokens may differ between machines, but not their number, nor the number of those that are trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

PROMPTS = 128
"""Number of prompts in each data file."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of the model and of a step."""

    hidden_size: int = 64
    layers: int = 4
    vocabulary: int = 160
    key_value_heads: int = 2
    positions: int = 1024
    """Tokens that the model's longest sequence may have."""
    prompts_per_step: int = 8
    group_size: int = 4
    new_tokens: int = 12
    """Tokens of every completion: none ends early."""
    max_tokens_per_microbatch: int = 256
    algorithm: str = "aapo"
    """A value of the setting ``algorithm``; with ``aapo``, reference rewards of the first four steps are stored."""

    @property
    def tokens(self) -> int:
        """Completion tokens of a step, over all ranks."""
        return self.prompts_per_step * self.group_size * self.new_tokens


@dataclass(frozen=True)
class MeanToken(Reward):
    """The mean token id as a reward, which two completions of a group hardly ever share."""

    kind = "mean_token"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return float(completion.token_ids.mean())


class Silent:
    """A reporter of the trainer that reports nothing."""

    def begin(self, step: int, *, validated: bool) -> None: ...
    def phase(self, name: str, done: int, total: int) -> None: ...
    def sync(self) -> None: ...
    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...
    def log_validation(self, step: int, metrics: dict[str, float], samples: Sequence[dict[str, Any]]) -> None: ...
    def save_rollouts(self, name: str, samples: Sequence[dict[str, Any]]) -> None: ...
    def note(self, text: str) -> None: ...
    def stop_requested(self) -> bool:
        return False


def make_input(workload: Workload, folder: Path) -> None:
    """Write the model's directory and the data under ``folder``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from examples.quickstart import arithmetic

    torch.manual_seed(0)
    tokenizer = arithmetic.make_tokenizer()
    config = Qwen2Config(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden_size,
        intermediate_size=3 * workload.hidden_size,
        num_hidden_layers=workload.layers,
        num_attention_heads=4,
        num_key_value_heads=workload.key_value_heads,
        max_position_embeddings=workload.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sums = arithmetic.split_sums(0)
    arithmetic.write_prompts(folder / "train.jsonl", sums.training[:PROMPTS])
    arithmetic.write_prompts(folder / "validation.jsonl", sums.validation[:PROMPTS])


def make_trainer(
    workload: Workload, folder: Path, stack: contextlib.ExitStack, world: int = 1, tp: int = 1, pp: int = 1
) -> Any:
    """An ``AAPOTrainer`` with the files of ``make_input``, ready for its first step. Collective."""
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.training.build import build_training

    rows = workload.prompts_per_step * workload.group_size
    config = load_config(
        [
            "experiment=quickstart",
            f"algorithm={workload.algorithm}",
            f"run.dir={folder / f'run_{world}_{tp}_{pp}'}",
            f"model.path={folder / 'model'}",
            f"data.train={folder / 'train.jsonl'}",
            f"data.validation={folder / 'validation.jsonl'}",
            f"trainer.devices={world}",
            "trainer.max_steps=4",
            f"model.tensor_model_parallel_size={tp}",
            f"model.pipeline_model_parallel_size={pp}",
            f"prompts_per_step={workload.prompts_per_step}",
            f"group_size={workload.group_size}",
            f"max_tokens_per_microbatch={workload.max_tokens_per_microbatch}",
            f"rollout.max_new_tokens={workload.new_tokens}",
            f"rollout.max_concurrent_tokens={rows * (16 + workload.new_tokens)}",
            "model.optim.lr=1e-9",
        ]
    )
    rewards = RewardRunner([(MeanToken(), 1.0)], workers=0, timeout_s=10.0)
    job = resolve(config, world, given=("rewards",))
    trainer: Any = build_training(job, reporter=Silent(), stack=stack, rewards=rewards)
    stack.callback(trainer.kept.wait)  # what still writes to the folder, which goes
    trainer.rollouts.sampling = dataclasses.replace(trainer.rollouts.sampling, stop_token_ids=())
    trainer.rollouts.fill_reference(0, lambda done, total: None, lambda: False)
    return trainer
