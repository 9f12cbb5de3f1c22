"""Shapes of models: those known by name, and any model directory's by its ``config.json``."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.config import Experts, ModelShape
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import first_architecture, read_config_json, shape_of, twin_problem

PLANNED = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
)
"""Architectures whose parameters and activations the plan counts; a sliding window is planned as if it were none."""


@dataclass(frozen=True)
class PlannedModel:
    """The shape of a model, as far as sizes depend on it."""

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    groups: int
    """Key-value heads."""
    head_size: int
    ffn: int
    """Feed-forward units of a layer or, where there are experts, of one expert."""
    vocabulary: int
    tied: bool
    """Input and output embeddings are one matrix."""
    max_positions: int
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    """Number of experts of a layer; 0: a dense model."""
    experts_per_token: int = 0

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.groups * self.head_size

    def shape(self) -> ModelShape:
        """The shape in the form that ``config.derive`` takes."""
        return ModelShape(
            architecture=self.architecture,
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            head_size=self.head_size,
            vocab_size=self.vocabulary,
            tied_embeddings=self.tied,
            max_position_embeddings=self.max_positions,
            experts=Experts(self.experts, self.experts_per_token, self.ffn) if self.experts else None,
        )


def _qwen2(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    *,
    vocabulary: int = 152064,
    tied: bool = False,
    positions: int,
) -> PlannedModel:
    return PlannedModel(
        name, "Qwen2ForCausalLM", layers, hidden, heads, groups, hidden // heads, ffn, vocabulary, tied, positions,
        qkv_bias=True,
    )  # fmt: skip


def _llama(name: str, layers: int, hidden: int, heads: int, ffn: int, *, tied: bool) -> PlannedModel:
    return PlannedModel(
        name, "LlamaForCausalLM", layers, hidden, heads, 8, hidden // heads, ffn, 128256, tied, 131072
    )  # fmt: skip


# Source of each: config.json of the model on the Hugging Face Hub (base models; instruct models have the same shapes).
_MODELS = (
    _qwen2("Qwen2.5-0.5B", 24, 896, 14, 2, 4864, vocabulary=151936, tied=True, positions=32768),
    _qwen2("Qwen2.5-1.5B", 28, 1536, 12, 2, 8960, vocabulary=151936, tied=True, positions=131072),
    _qwen2("Qwen2.5-3B", 36, 2048, 16, 2, 11008, vocabulary=151936, tied=True, positions=32768),
    _qwen2("Qwen2.5-7B", 28, 3584, 28, 4, 18944, positions=131072),
    _qwen2("Qwen2.5-14B", 48, 5120, 40, 8, 13824, positions=131072),
    _qwen2("Qwen2.5-32B", 64, 5120, 40, 8, 27648, positions=131072),
    _qwen2("Qwen2.5-72B", 80, 8192, 64, 8, 29568, positions=131072),
    _qwen2("Qwen2.5-Math-7B", 28, 3584, 28, 4, 18944, positions=4096),
    _qwen2("DeepSeek-R1-Distill-Qwen-1.5B", 28, 1536, 12, 2, 8960, vocabulary=151936, positions=131072),
    _llama("Llama-3.2-1B", 16, 2048, 32, 8192, tied=True),
    _llama("Llama-3.2-3B", 28, 3072, 24, 8192, tied=True),
    _llama("Llama-3.1-8B", 32, 4096, 32, 14336, tied=False),
    _llama("Llama-3.1-70B", 80, 8192, 64, 28672, tied=False),
    PlannedModel(
        "Qwen3-30B-A3B", "Qwen3MoeForCausalLM", 48, 2048, 32, 4, 128, 768, 151936, False, 40960, qk_norm=True,
        experts=128, experts_per_token=8,
    ),
    PlannedModel(
        "Qwen3-235B-A22B", "Qwen3MoeForCausalLM", 94, 4096, 64, 4, 128, 1536, 151936, False, 40960, qk_norm=True,
        experts=128, experts_per_token=8,
    ),
)  # fmt: skip
KNOWN = {model.name: model for model in _MODELS}


def find(name: str) -> PlannedModel:
    """The model of this name; case and the owner before a slash do not matter.

    Raises:
        ConfigError: it is not known; names those that are.
    """
    if (known := known_as(name)) is None:
        by_lower = {known.lower(): known for known in KNOWN}
        close = difflib.get_close_matches(_plain(name), by_lower, n=1)
        hint = f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
        raise ConfigError(
            f"model={name}: not known by name{hint}. Known are {', '.join(KNOWN)}; any other by model.path=DIR"
        )
    return KNOWN[known]


def known_as(name: str) -> str | None:
    """The name in ``KNOWN`` of a hub's name or a directory; None: not known."""
    return next((known for known in KNOWN if known.lower() == _plain(name)), None)


def _plain(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-instruct").removesuffix("-base")


def read(path: str) -> PlannedModel:
    """The model of a directory with a ``config.json``; the weights need not be there.

    Raises:
        ConfigError: no such file, not JSON, or an architecture that isn't known here.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.path={path}: {file} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    return from_hugging_face(config, Path(path).name)


def is_planned(path: str) -> bool:
    """Whether ``read`` knows the architecture of a checked model directory; not every one that trains is planned."""
    return first_architecture(read_config_json(Path(path))) in PLANNED


def from_hugging_face(config: dict[str, Any], name: str) -> PlannedModel:
    """The model of a ``config.json``.

    Raises:
        ConfigError: an architecture that isn't known here, a size that is missing, or what a run would be refused for.
    """
    architecture = first_architecture(config)
    if architecture not in PLANNED:
        raise ConfigError(f"{name}: architecture {architecture}; planned can be {', '.join(PLANNED)}")
    if problem := twin_problem(config):
        raise ConfigError(f"{name}: {problem}")
    shape = shape_of(config)
    experts = shape.experts
    return PlannedModel(
        name=name,
        architecture=architecture,
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        heads=shape.num_attention_heads,
        groups=shape.num_query_groups,
        head_size=shape.head_size,
        ffn=experts.ffn_hidden_size if experts else shape.ffn_hidden_size,
        vocabulary=shape.vocab_size,
        tied=shape.tied_embeddings,
        max_positions=shape.max_position_embeddings,
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture.startswith("Qwen3"),
        experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
    )
