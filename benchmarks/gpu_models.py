"""Models of Qwen2.5's shapes with random weights for ``benchmarks.gpu``, and their configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_aapo.config import Config, pad_multiple, with_machine_defaults
from nemo_aapo.config.compose import load_config
from nemo_aapo.distributed.device import device
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import Machine, refusal
from nemo_aapo.learner.microbatch import PrefixGroup, collate
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.planning import hardware, models
from nemo_aapo.planning.inputs import Question, plan_inputs
from nemo_aapo.planning.memory import rank_memory
from nemo_aapo.types import Sample

SHAPES: dict[str, dict[str, int]] = {  # Qwen2.5's config.json
    "0.5B": {"hidden": 896, "ffn": 4864, "layers": 24, "heads": 14, "groups": 2},
    "1.5B": {"hidden": 1536, "ffn": 8960, "layers": 28, "heads": 12, "groups": 2},
}
VOCABULARY = 151_936


def random_model(shape: dict[str, int], folder: Path) -> Path:
    """A Qwen2 directory of this shape: random bf16 weights, tied embeddings; written from the GPU."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        max_position_embeddings=32_768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, meta in model.named_parameters():
        if name == "lm_head.weight":
            continue  # tied
        if meta.dim() == 1:
            value = torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, device="cuda")
        else:
            value = torch.randn(meta.shape, generator=generator, device="cuda") * 0.02
        tensors[name] = value.to(torch.bfloat16).cpu()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(path: Path, precision: str, micro_batch_tokens: int, sequence: int) -> Config:
    """The configuration of a run on one GPU.

    Args:
        sequence: tokens of a sequence, half of them prompt.
    """
    return load_config(
        [
            f"model.path={path}",
            "data.train=unused",
            "data.validation=unused",
            "trainer.devices=1",
            f"precision={precision}",
            f"max_tokens_per_microbatch={micro_batch_tokens}",
            f"data.max_prompt_tokens={sequence // 2}",
            f"rollout.max_new_tokens={sequence // 2}",
        ]
    )


def usable_precisions(names: Sequence[str]) -> list[str]:
    """The precisions that this GPU can compute in; prints the reasons why others are left out.

    Raises:
        ConfigError: it can't compute in bf16.
    """
    usable, machine = [], Machine.present()
    for precision in names:
        problem = refusal(config_of(Path("unused"), precision, 1024, 1024), machine)
        if problem and precision == "bf16":
            raise ConfigError(problem)
        if problem:
            print(f"left out: {problem}", flush=True)
        else:
            usable.append(precision)
    return usable


def fitting(path: Path, micro_batch_tokens: int, sequence: int, memory_bytes: float) -> int:
    """Tokens of a micro-batch, halved until the planned memory of a training step in bf16 fits the GPU."""
    gpu = dataclasses.replace(hardware.find("h100"), memory_bytes=memory_bytes)  # its other figures decide times only
    question = Question(models.read(str(path)), gpu, sequence / 2, sequence / 2, dataset_prompts=None)
    while micro_batch_tokens > sequence:
        config = with_machine_defaults(config_of(path, "bf16", micro_batch_tokens, sequence), on_gpu=True)
        if rank_memory(plan_inputs(config, question)).total("train") <= memory_bytes:
            break
        micro_batch_tokens //= 2
    return micro_batch_tokens


def random_batch(policy: Any, tokens: int, sequence: int, micro_batches: int, *, seed: int) -> MicroBatch:
    """One of a step's ``micro_batches``: packed sequences of random tokens, half of each is prompt."""
    generator, half = np.random.default_rng(seed), sequence // 2
    samples = [
        Sample(
            generator.integers(2, VOCABULARY, half).astype(np.int32),
            generator.integers(2, VOCABULARY, half).astype(np.int32),
            np.full(half, -12.0, np.float32),
            float(generator.normal()),
        )
        for _ in range(tokens // sequence)
    ]
    weight = 1.0 / (len(samples) * half * micro_batches)
    groups, multiple = PrefixGroup.separate(samples), pad_multiple(policy.config)
    return collate(groups, [weight] * len(samples), multiple=multiple, device=device(), packed=True)
