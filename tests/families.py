"""Tiny random models of the families that ``tests/conversion/test_families.py`` holds to what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_models import SIZES, save_character_tokenizer, save_model


@dataclass(frozen=True)
class Family:
    """One family, with what sets it apart turned on and small enough to matter in sequences of twenty tokens."""

    config: Callable[[], Any]
    """transformers' configuration of a tiny model."""
    layouts: tuple[str, ...] = ("TP2", "PP2", "CP2")
    """Of ``LAYOUTS`` in the test, those that it is trained and sampled on."""
    decoded: bool = True
    """Whether the megatron engine's decoder knows it."""
    norms: float = 1.0
    """Mean of the norms' weights."""


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**SIZES, sliding_window=6, tie_word_embeddings=False)


def _gemma() -> Any:
    from transformers import GemmaConfig

    return GemmaConfig(**SIZES, head_dim=32)


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    scaling = {"rope_type": "linear", "factor": 2.0}
    rope = {"rope_theta": 5e4, "rope_local_base_freq": 300.0, "rope_scaling": scaling}
    return Gemma3TextConfig(**SIZES, **rope, head_dim=32, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=20)


def _olmoe() -> Any:
    from transformers import OlmoeConfig

    sizes = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
    return OlmoeConfig(**sizes, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)


def _nemotron() -> Any:
    from transformers import NemotronConfig

    sizes = {key: value for key, value in SIZES.items() if key != "rms_norm_eps"}
    return NemotronConfig(**sizes, head_dim=16, partial_rotary_factor=0.5, norm_eps=1e-5, tie_word_embeddings=False)


FAMILIES = {
    "mistral": Family(_mistral),
    "gemma": Family(_gemma, norms=0.0),
    "gemma3": Family(_gemma3, norms=0.0),
    "olmoe": Family(_olmoe, layouts=("EP2", "PP2", "CP2")),
    "nemotron": Family(_nemotron, norms=0.0, decoded=False),
}


def make_family(name: str, folder: Path) -> Path:
    """The family's tiny model with a character tokenizer."""
    save_model(FAMILIES[name].config(), folder / name, norms=FAMILIES[name].norms)
    save_character_tokenizer(folder / name)
    return folder / name
