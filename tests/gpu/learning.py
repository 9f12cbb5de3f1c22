"""One batch of rollouts, learned from: on a GPU in the tests' process; on the CPU in fp32 in a process of its own.

CUDA_VISIBLE_DEVICES= python -m tests.gpu.learning MODEL OUT.npz '{"updates": 2}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Dimensions that every FP8 recipe takes."""
BUDGET = 1024
GRADIENT = "gradient/"


def make_model(folder: Path) -> Path:
    """A random Qwen2 with weights of a trained model's size."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tests.tiny_models import save_character_tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES)).float()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_character_tokenizer(folder)
    return folder


def make_groups(seed: int = 3, count: int = 8, size: int = 4):
    """Scored groups of mixed lengths."""
    from nemo_aapo.types import Completion, Group, Prompt

    generator = np.random.default_rng(seed)

    def tokens(low, high):
        return generator.integers(2, 1000, generator.integers(low, high)).astype(np.int32)

    groups = []
    for i in range(count):
        completions = tuple(
            Completion(ids, np.full(len(ids), -5.0, np.float32), "stop", 0)
            for ids in (tokens(3, 200) for _ in range(size))
        )
        groups.append(
            Group(
                prompt=Prompt(str(i), tokens(2, 60), "", "", ""),
                completions=completions,
                texts=(),
                rewards=np.zeros(size),
                reward_parts={},
                failed=np.zeros(size, bool),
                advantages=generator.normal(size=size),
            )
        )
    return groups


def learn(path: Path | str, updates: int = 1, groups=None, policy=None, **settings: Any) -> dict[str, Any]:
    """Loss and gradient norm of each update, the first gradient by parameter, log-probs before, weights after all."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.config import pad_multiple
    from nemo_aapo.learner import optimization
    from nemo_aapo.learner.learner import Learner
    from tests.policies import make_policy
    from tests.tiny_models import make_config

    changes = {
        "data.max_prompt_tokens": 64,
        "rollout.max_new_tokens": 256,
        "max_tokens_per_microbatch": BUDGET,
        "model.optim.eps": 1e-3,
        **settings,
    }
    config = make_config(path, **{key.replace(".", "__"): value for key, value in changes.items()})
    policy = policy or make_policy(config)
    config = policy.config
    learner = Learner(
        policy,
        Objective.of(config.algorithm, 256),
        BUDGET,
        1,
        pad_multiple(config),
        config.model.sequence_packing,
        bool(config.model.share_prompts),
    )
    groups = groups or make_groups()
    batches, _ = learner._microbatches(groups)
    logprobs = by_sequence(batches, policy.score(batches))
    gradients = []
    clip = optimization.clip_gradients

    def keep_gradient(optimizer):
        named = policy.module.named_parameters()
        gradients.append({name: p.main_grad.float().flatten().cpu().numpy().copy() for name, p in named})
        return clip(optimizer)

    with mock.patch.object(optimization, "clip_gradients", keep_gradient):
        metrics = [learner.update(groups) for _ in range(updates)]
    weights = {name: tensor.float().numpy().copy() for name, tensor in policy.named_weights()}
    return {
        "loss": [step["loss"] for step in metrics],
        "grad_norm": [step["grad_norm"] for step in metrics],
        "entropy": [step["entropy"] for step in metrics],
        "logprobs": logprobs,
        "gradient": plain_names(gradients[0]),
        "weights": weights,
    }


def by_sequence(batches, scored) -> np.ndarray:
    """Log-probs [tokens], whatever the micro-batches: sequences ordered by their tokens."""
    pieces = []
    for batch, values in zip(batches, scored, strict=True):
        bounds = np.cumsum(batch.lengths)[:-1]
        targets = np.split(batch.targets.cpu().numpy(), bounds)
        pieces += [(tuple(t), v) for t, v in zip(targets, np.split(values, bounds), strict=True)]
    return np.concatenate([values for _, values in sorted(pieces, key=lambda piece: piece[0])])


def plain_names(gradient: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms' weights have other names in TransformerEngine's layers."""
    return {
        name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
            "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
        ): values
        for name, values in gradient.items()
    }


def main() -> None:
    from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

    path, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    initialize_model_parallel(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1, timeout_s=120)
    found = learn(path, **settings)
    numbers = {key: found[key] for key in ("loss", "grad_norm", "entropy", "logprobs")}
    np.savez(out, **numbers, **{GRADIENT + name: values for name, values in found["gradient"].items()})
    destroy_model_parallel()


if __name__ == "__main__":
    main()
