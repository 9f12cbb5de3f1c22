"""A Hugging Face model directory, checked before anything expensive is done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config, Experts, ModelShape, Sizes, derive
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.weights import check_weights
from nemo_aapo.text import transformers5

ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
    "OlmoeForCausalLM",
    "NemotronForCausalLM",
)
"""Architectures that train and convert."""

NOT_DECODED = {
    "NemotronForCausalLM": "LayerNorms with biases and a feed-forward part without a gate (squared ReLU)",
}
"""Architectures that the megatron engine's decoder does not know, with what of them; the plain engine samples them."""

LOCAL_LAYERS_ONLY = ("Gemma3ForCausalLM", "OlmoeForCausalLM")
"""Architectures whose layers are built of mcore's own parts here, which run without a GPU."""

CPU_ONLY = (
    "layers of this family are built of megatron-core's own parts here, which run without a GPU only; with "
    "TransformerEngine's they were never tried"
)

_SHARED = "an expert that every token passes is not decoded here"

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values of ``rope_scaling`` that mcore's rotary embedding takes for granted; Llama 3.1, 3.2 and 3.3 have them."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "OlmoeForCausalLM": {"num_experts": 64, "num_experts_per_tok": 8},
    "MistralForCausalLM": {"num_key_value_heads": 8},
    "GemmaForCausalLM": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
}
"""What transformers 4.57 takes for a size that ``config.json`` leaves out, where it differs from ``shape_of``'s."""

NO_HEAD_DIM = ("OlmoeForCausalLM",)
"""Architectures whose heads share out the hidden size, whatever ``config.json`` has as ``head_dim``."""

NO_EXPERT_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "decoder_sparse_step": ((1,), "dense layers among those of experts are not told apart in Megatron-Bridge"),
    "mlp_only_layers": (([],), "dense layers among those of experts are not told apart in Megatron-Bridge"),
    "shared_expert_intermediate_size": ((0,), _SHARED),
    "num_shared_experts": ((0,), _SHARED),
    "n_shared_experts": ((0,), _SHARED),
    "scoring_func": (("softmax",), "a router that scores otherwise, with a bias for each expert, is not decoded here"),
    "routed_scaling_factor": ((1,), "transformers does not scale the experts' weights, and Megatron would"),
    "n_group": ((1,), "transformers does not limit the choice to groups of experts, and Megatron would"),
}
"""Settings of a model with experts: the values that are computed here, besides null, and why no other is."""

LOST = (
    "gets lost in Megatron-Bridge 0.3.1 and was not tried with later ones, which may carry it over: the Megatron model "
    "may differ"
)
"""What is said of settings that one of the two lines of Megatron does not compute."""

REFUSED = {
    "Gemma2ForCausalLM": "Megatron-Bridge builds its layers of TransformerEngine classes only "
    "(TERowParallelLinearLayerNorm), which do not exist on a CPU",
    "MixtralForCausalLM": "Megatron-Bridge has no map for its weights",
    "Qwen2MoeForCausalLM": _SHARED,
    "DeepseekV2ForCausalLM": f"latent attention is not decoded here, and {_SHARED}",
    "DeepseekV3ForCausalLM": f"latent attention and sigmoid routers with a bias are not decoded here, and {_SHARED}",
    "Glm4MoeForCausalLM": f"sigmoid routers with a bias are not decoded here, and {_SHARED}",
    "GptOssForCausalLM": "its experts have biases and a clamped activation, and its attention sinks: not decoded here",
}
"""Architectures that neither train nor convert, with the reason."""


def read_model_dir(path: str) -> ModelShape:
    """Check that the directory holds a whole model of a known architecture, and read its shape.

    Only headers are read: a 70B model takes milliseconds.

    Raises:
        ConfigError: missing directory or file, half-written weights or others than the model's, unknown architecture,
            or a setting of the model that megatron-core computes otherwise; what to do about it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(
            f"model.path={path}: no such directory. It must be a local Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer files); `huggingface-cli download NAME --local-dir DIR` makes one"
        )
    config = read_config_json(directory)
    architecture = first_architecture(config)
    if architecture not in ARCHITECTURES:
        reason = f" ({REFUSED[architecture]})" if architecture in REFUSED else ""
        raise ConfigError(
            f"model.path={path}: architecture {architecture}{reason}; supported are {', '.join(ARCHITECTURES)}"
        )
    if problem := twin_problem(config):
        raise ConfigError(f"model.path={path}: {problem}")
    shape = shape_of(config)
    check_weights(directory, config, shape)
    return shape


def twin_problem(config: dict[str, Any]) -> str | None:
    """What of a ``config.json`` makes the Megatron model compute something else than transformers does; None: nothing.

    Args:
        config: of an architecture that the Bridge has a map for.
    """
    if problem := transformers5.problem(config):
        return problem
    config = {**config, **transformers5.translation(config)}
    problems = _rope_problem, _window_problem, _gemma_problem, _activation_problem, _experts_problem
    return next((found for problem in problems if (found := problem(config))), None)


def _rope_problem(config: dict[str, Any]) -> str | None:
    if config.get("partial_rotary_factor") not in (None, 1) and "NemotronForCausalLM" not in config["architectures"]:
        return f"partial_rotary_factor {LOST}"
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    if not isinstance(scaling, dict):
        return f"rope_scaling={scaling!r} is not what transformers writes there: a JSON object"
    kind = transformers5.rope_type(scaling)
    if kind == "default" or (kind == "linear" and "Gemma3ForCausalLM" in config["architectures"]):
        return None
    if kind != "llama3" or "LlamaForCausalLM" not in config["architectures"]:
        return f"rope_scaling of type {kind} {LOST}"
    other = {key: scaling.get(key) for key, value in LLAMA3_ROPE.items() if scaling.get(key) != value}
    if other:
        return f"rope_scaling has {other}, but megatron-core computes with {LLAMA3_ROPE} whatever a model says"
    return None


def _window_problem(config: dict[str, Any]) -> str | None:
    if config.get("use_sliding_window") and "MistralForCausalLM" not in config["architectures"]:
        return f"use_sliding_window=true {LOST}"
    return None


NO_GEMMA_SETTINGS = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
"""Settings of Gemma and Gemma 3: the value that is computed here, besides null."""


def _gemma_problem(config: dict[str, Any]) -> str | None:
    if not first_architecture(config).startswith("Gemma"):
        return None
    for key, computed in NO_GEMMA_SETTINGS.items():
        if config.get(key) not in (None, computed):
            return f"{key}={config[key]!r} gets lost in the weight map: the Megatron model would differ"
    if first_architecture(config) == "Gemma3ForCausalLM" and config.get("sliding_window", 0) is None:
        return "sliding_window=null: Gemma 3's local layers have a window; give the one that the model was trained with"
    return None


ACTIVATIONS = {
    "GemmaForCausalLM": ("hidden_act", "gelu_pytorch_tanh"),
    "Gemma3ForCausalLM": ("hidden_activation", "gelu_pytorch_tanh"),
    "NemotronForCausalLM": ("hidden_act", "relu2"),
}
"""The activation that is computed, by its key and name, where it is not ``hidden_act`` silu."""


def _activation_problem(config: dict[str, Any]) -> str | None:
    key, computed = ACTIVATIONS.get(first_architecture(config), ("hidden_act", "silu"))
    if (activation := config.get(key)) not in (None, computed):
        return f"{key}={activation}: {computed} is computed here, whatever a model says"
    return None


def _experts_problem(config: dict[str, Any]) -> str | None:
    if first_architecture(config) not in ("Qwen3MoeForCausalLM", "OlmoeForCausalLM"):
        return None
    if config.get("clip_qkv") is not None:
        return f"clip_qkv={config['clip_qkv']!r} gets lost in the weight map: the Megatron model would differ"
    for key, (computed, reason) in NO_EXPERT_SETTINGS.items():
        if config.get(key) not in (None, *computed):
            return f"{key}={config[key]!r}: {reason}; the Megatron model would differ"
    if config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        return "num_experts_per_tok=1 with norm_topk_prob=true: each weight would be 1, and the router never learn"
    return None


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape of the model that a ``config.json`` describes.

    Raises:
        ConfigError: a size is missing, or is no number.
    """
    architecture = first_architecture(config)
    config = {**DEFAULTS.get(architecture, {}), **config, **transformers5.translation(config)}
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    return ModelShape(
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", heads),
        head_size=hidden // heads if architecture in NO_HEAD_DIM else _size(config, "head_dim", hidden // heads),
        vocab_size=_size(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=_size(config, "max_position_embeddings", 2**31),
        experts=_experts_of(config) if config.get("num_experts") else None,
        not_decoded=NOT_DECODED.get(architecture),
    )


def _experts_of(config: dict[str, Any]) -> Experts:
    return Experts(
        count=_size(config, "num_experts"),
        per_token=_size(config, "num_experts_per_tok"),
        ffn_hidden_size=_size(config, "moe_intermediate_size", config.get("intermediate_size")),
    )


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json has {key}={value!r}, where a number of at least 1 is needed")
    return value


def first_architecture(config: dict[str, Any]) -> str:
    """The first architecture of a ``config.json``, or ``none named``."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "none named"


def read_config_json(directory: Path) -> dict[str, Any]:
    """A model directory's ``config.json``, as it is written.

    Raises:
        ConfigError: missing or damaged.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing (is this a Hugging Face model directory?)") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Half-written?") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a model's configuration, which is a JSON object")
    return config


def check_model(config: Config, world_size: int) -> tuple[ModelShape, Sizes]:
    """Check the model directory against the configuration and the number of ranks, in milliseconds and without torch.

    Raises:
        ConfigError: as ``read_model_dir`` and ``config.derive``.
    """
    shape = read_model_dir(config.model.path)
    return shape, derive(config, shape, world_size)
