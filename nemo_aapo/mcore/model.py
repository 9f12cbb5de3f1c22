"""This rank's stage of a Megatron GPTModel: how it is built, and where its forward pass ends in hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.errors import ConfigError
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.bridge.weights import WeightMap
from nemo_aapo.mcore.cpu import layers
from nemo_aapo.mcore.experts.model import expert_fields, mark_experts
from nemo_aapo.models.directory import CPU_ONLY


def build_module(config: Config, weight_map: WeightMap) -> GPTModel:
    """This rank's stage of the model as a configuration cuts it up, with random weights.

    Raises:
        ConfigError: the vocabulary can't be cut over the tensor-parallel ranks.
    """
    model = config.model
    fields = {
        **precision.model_fields(config),
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "cp_comm_type": "p2p",  # of TransformerEngine, whose all-to-all takes no packed rows; a CPU's attention chooses
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        "recompute_granularity": model.recompute_granularity,
        "recompute_method": "uniform" if model.recompute_granularity == "full" else None,
        "recompute_num_layers": 1 if model.recompute_granularity == "full" else None,
        "recompute_modules": list(model.recompute_modules),
    }
    return build_stage(weight_map, fields)


def build_stage(weight_map: WeightMap, fields: Mapping[str, Any]) -> GPTModel:
    """This rank's stage of the model, with random weights.

    Args:
        fields: of the Bridge's provider: precision and layout.

    Raises:
        ConfigError: as ``build_module``.
    """
    provider = weight_map.provider()
    if (provider.post_norms or provider.norms_over_heads) and device().type == "cuda":
        raise ConfigError(f"{weight_map.path}: {CPU_ONLY}")
    fields = {
        **fields,
        # The weights come from the model directory, but mcore marks tensor-parallel parameters in the same breath
        # as it initialises them, and the gradient norm counts unmarked ones on one rank only.
        "perform_initialization": True,
        "hidden_dropout": 0.0,  # the sampled policy and the trained one must be the same function
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,  # neither the schedule nor DDP divides the loss
        "variable_seq_lengths": True,  # micro-batches differ in length
        "moe_token_dispatcher_type": "alltoall",  # mcore wants it with variable lengths, dense models included
        **expert_fields(provider),
        "batch_p2p_comm": True,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": True,
        "parallel_output": True,
    }
    for name, value in fields.items():
        setattr(provider, name, value)
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()  # Gemma's provider asks it for the stage
    provider.finalize()
    if provider.vocab_size % provider.tensor_model_parallel_size:
        raise ConfigError(
            f"model.tensor_model_parallel_size={provider.tensor_model_parallel_size} does not divide the vocabulary "
            f"of {provider.vocab_size} entries"
        )
    module = provider.provide(pre_process=parallel.is_first_stage(), post_process=parallel.is_last_stage())
    mark_experts(module)
    if not torch.cuda.is_available():
        layers.use_kernels(module)
        layers.add_parts(module)
    return module.to(device())


def output_weight(module: GPTModel) -> torch.Tensor:
    """This rank's rows [vocabulary / TP, h] of the output layer; last stage only."""
    if module.share_embeddings_and_output_weights:
        return module.shared_embedding_or_output_weight()
    return module.output_layer.weight


class VocabularyShard(NamedTuple):
    """The part of the output layer that a tensor-parallel rank holds."""

    weight: torch.Tensor
    """[vocabulary / TP, h]"""
    start: int
    """Token id of its first row."""
    group: torch.distributed.ProcessGroup
    """The ranks that hold the other rows."""


def vocabulary_shard(module: GPTModel) -> VocabularyShard:
    """This rank's part of the output layer; last stage only."""
    weight = output_weight(module)
    start = parallel.tensor_parallel_rank() * weight.shape[0]
    return VocabularyShard(weight, start, parallel.groups().tensor)


@contextlib.contextmanager
def hidden_states_out(module: GPTModel) -> Iterator[None]:
    """Inside, the last stage returns its normalised hidden states [s, b, h] and skips the output layer.

    ``GPTModel._postprocess`` returns early for a model that is not the last stage; the final norm belongs to the
    decoder block, which keeps its own flag.
    """
    post_process = module.post_process
    module.post_process = False
    try:
        yield
    finally:
        module.post_process = post_process
