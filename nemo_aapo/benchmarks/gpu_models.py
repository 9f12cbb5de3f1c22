"""What ``benchmarks.gpu`` measures: models of Qwen2.5's shapes with random weights, as policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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


def policy_of(path: Path, precision: str, micro_batch_tokens: int, sequence: int) -> Any:
    """A ``MegatronPolicy`` of a model directory.

    Args:
        sequence: tokens of a sequence, half of them prompt.
    """
    from nemo_aapo.entry import load_config
    from nemo_aapo.policy.megatron import MegatronPolicy
    from nemo_aapo.policy.model_dir import read_model_dir

    config = load_config(
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
    return MegatronPolicy(config, read_model_dir(str(path)))
