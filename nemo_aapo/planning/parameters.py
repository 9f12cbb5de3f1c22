"""Number of parameters of each rank, by the way in which mcore shards the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_aapo.config.schema import Lora
from nemo_aapo.planning.inputs import Layout
from nemo_aapo.planning.models import PlannedModel


@dataclass(frozen=True)
class Parameters:
    """Number of parameters on a rank, by kind."""

    embedding: int
    """Parameters of the input embedding."""
    linear: int
    """Parameters of the layers' matrices that every token passes, without biases."""
    experts: int
    """Parameters of the experts' matrices, which no tensor-parallel rank cuts."""
    small: int
    """Parameters of norms, biases and routers."""
    output: int
    """Parameters of the output layer. A tied one counts only as a copy, on a last stage that is not the first."""
    adapters: int = 0
    """Parameters of LoRA's A and B."""

    @property
    def total(self) -> int:
        return self.embedding + self.linear + self.experts + self.small + self.output + self.adapters

    @property
    def trained(self) -> int:
        """Number of trained parameters: the adapters if there are any, else all."""
        return self.adapters or self.total

    @property
    def trained_experts(self) -> int:
        """Those of ``trained`` that are experts'. Adapters are none: with experts, only attention can have them."""
        return 0 if self.adapters else self.experts


def attention_matrices(model: PlannedModel) -> int:
    """Parameters of one layer's query, key, value and output projection."""
    return model.hidden * (2 * model.query + 2 * model.key_value)


def mlp_matrices(model: PlannedModel) -> int:
    """Parameters of one gated feed-forward block, or of one expert."""
    return 3 * model.hidden * model.ffn


def targets(model: PlannedModel) -> dict[str, tuple[int, int]]:
    """Layers that can have an adapter: name in ``model.lora.target_modules`` -> (inputs, outputs) of its matrix."""
    return {
        "linear_qkv": (model.hidden, model.query + 2 * model.key_value),
        "linear_proj": (model.query, model.hidden),
        "linear_fc1": (model.hidden, 2 * model.ffn),
        "linear_fc2": (model.ffn, model.hidden),
    }


def adapted(model: PlannedModel, layout: Layout, lora: Lora) -> int:
    """Number of parameters of the matrices below adapters, on one rank."""
    sizes = targets(model)
    return (
        model.layers * sum(math.prod(sizes[name]) for name in lora.target_modules) // layout.tensor // layout.pipeline
    )


def rank_parameters(model: PlannedModel, layout: Layout, stage: int, lora: Lora | None = None) -> Parameters:
    """Parameters of one rank of a pipeline stage.

    Args:
        stage: 0 .. pipeline - 1.
    """
    tensor, layers = layout.tensor, model.layers // layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    linear = attention_matrices(model) + (0 if model.experts else mlp_matrices(model))
    experts = mlp_matrices(model) * model.experts
    small = 2 * model.hidden + 2 * model.head_size * model.qk_norm + model.hidden * model.experts
    if model.qkv_bias:
        small += (model.query + 2 * model.key_value) // tensor
    vocabulary = model.vocabulary // tensor * model.hidden
    return Parameters(
        embedding=vocabulary if first else 0,
        linear=layers * linear // tensor,
        experts=layers * experts // layout.expert,
        small=layers * small + (model.hidden if last else 0),
        output=vocabulary if last and not (model.tied and first) else 0,
        adapters=layers * _adapter(model, lora) // tensor if lora else 0,
    )


def _adapter(model: PlannedModel, lora: Lora) -> int:
    """Number of parameters of one layer's A [rank, inputs] and B [outputs, rank], both sharded over tensor ranks."""
    sizes = targets(model)
    return lora.rank * sum(sum(sizes[name]) for name in lora.target_modules)


def whole(model: PlannedModel) -> Parameters:
    """The parameters of the whole model."""
    return rank_parameters(model, Layout(), 0)


def active(model: PlannedModel) -> int:
    """Number of parameters that one token passes: all but the experts that it is not sent to."""
    every = whole(model)
    if not model.experts:
        return every.total
    return every.total - every.experts + every.experts * model.experts_per_token // model.experts
