"""A module's weights as a checkpoint has them: under names that do not depend on layers, layout or adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.models.gpt import GPTModel

from nemo_aapo.mcore.bridge.lora import ADAPTER, is_adapted, merged_weight

EXTRA_STATE = "_extra_state"
"""torch's name for what a module keeps besides tensors."""


def sharded_model_state(module: GPTModel) -> dict[str, Any]:
    """The module's weights by name, as mcore's dist_checkpointing takes them.

    TransformerEngine's FP8 state is left out: it is a pickle, and loading it may run code. Only delayed scaling needs
    it; its maxima are found anew after a resume.
    """
    return {name: part for name, part in module.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)}


def load_model_state(module: GPTModel, state: dict[str, Any]) -> None:
    """Take over what was read into ``sharded_model_state(module)``.

    mcore's state names an adapted layer's own tensors as if it had no adapter, so that base model and adapted model
    share names; torch names them by the wrapper.
    """
    absent = {name: torch.empty(0) for name in module.state_dict() if name.endswith(EXTRA_STATE)}
    wrapped = [name + "." for name, part in module.named_modules() if is_adapted(part)]
    module.load_state_dict({_with_wrapper(name, wrapped): value for name, value in {**state, **absent}.items()})


def _with_wrapper(name: str, wrapped: Iterable[str]) -> str:
    for prefix in wrapped:
        if name.startswith(prefix) and not name.startswith(prefix + ADAPTER[1:]):
            return f"{prefix}to_wrap.{name.removeprefix(prefix)}"
    return name


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A part of a weight that this rank holds, and where it lies in the whole weight, whatever the layout."""

    key: str
    """The weight's name; layers, and experts of a layer, are axes of one weight."""
    start: tuple[int, ...]
    """Of each axis of the whole weight, the first index."""
    tensor: torch.Tensor
    """The model's own memory, with as many axes as the whole weight has."""
    counts: bool
    """False: a copy of what another rank holds."""


def weight_parts(module: GPTModel, vocab_size: int) -> list[WeightPart]:
    """The parts of the model that this rank holds; rows that pad the vocabulary are left out.

    Adapters are merged into the layers that have them, as the in-process engine merges them; those parts are new
    tensors. Collective over the tensor-parallel ranks then.

    Args:
        vocab_size: the model's, without padding.
    """
    adapted = {part.to_wrap.get_parameter("weight").data_ptr(): part for part in module.modules() if is_adapted(part)}
    parts = []
    for name, entry in sharded_model_state(module).items():
        if ADAPTER in name:
            continue
        if adapted and (linear := adapted.get(entry.data.data_ptr())):
            entry = replace(entry, data=merged_weight(cast(torch.nn.Module, linear)))
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for sharded in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(sharded, ShardedTensor):
                parts.append(_part_of(sharded, vocab_size))
    return [part for part in parts if part.tensor.numel()]


def _part_of(sharded: ShardedTensor, vocab_size: int) -> WeightPart:
    tensor = sharded.data.detach()
    if sharded.allow_shape_mismatch:  # a vocabulary, which is padded to suit the layout
        tensor = tensor[: max(0, vocab_size - sharded.global_offset[0])]
    tensor = tensor.view(*(1,) * sharded.prepend_axis_num, *tensor.shape)
    return WeightPart(sharded.key, sharded.global_offset, tensor, is_main_replica(sharded.replica_id))
