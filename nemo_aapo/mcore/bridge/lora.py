"""LoRA: adapters on Megatron's linear layers, by Megatron-Bridge's PEFT; the base weights stay as they are.

A layer computes x W^T + (alpha / rank) x A^T B^T, with A [rank, in] and B [out, rank] cut over the tensor-parallel
ranks. Who reads weights instead of calling the module (the in-process rollout engine) takes the merged ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from nemo_aapo.config.schema import Lora
from nemo_aapo.distributed import parallel
from nemo_aapo.mcore.bridge.loader import lora_class
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.seeds import stream_seed
from nemo_aapo.utils.files import whole_directory

ADAPTER = ".adapter."
"""Stands between the name of a layer and that of its adapter's tensor."""


class Linear(Protocol):
    """This rank's part of a linear layer, mcore's or TransformerEngine's."""

    weight: torch.Tensor


class Adapter(Protocol):
    """This rank's part of a LoRA adapter, as Megatron-Bridge makes it."""

    linear_in: Linear
    """A"""
    linear_out: Linear
    """B"""
    input_is_parallel: bool
    """Whether the tensor-parallel ranks cut the layer along its input; otherwise along its output."""
    alpha: float
    dim: int
    """The rank."""


class AdaptedLinear(Protocol):
    """A linear layer with an adapter, as Megatron-Bridge wraps it."""

    to_wrap: torch.nn.Module
    adapter: Adapter


def add_adapters(module: GPTModel, lora: Lora, seed: int) -> None:
    """Freeze the module's weights and put an adapter on each target layer; B is zero, so that nothing changes yet.

    Args:
        module: this rank's stage, with its base weights or without.
        seed: of A, which is the same whatever the layout.
    """
    lora_class()(dim=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=list(lora.target_modules))(module)
    for layer in module.decoder.layers:
        for name, linear in layer.named_modules():
            if is_adapted(linear):
                _initialize(linear.adapter, stream_seed(seed, "lora", layer.layer_number, name))


def is_adapted(linear: object) -> TypeGuard[AdaptedLinear]:
    """Whether a linear layer has an adapter."""
    return hasattr(linear, "to_wrap") and hasattr(linear, "adapter")


def base_layer(linear: torch.nn.Module) -> torch.nn.Module:
    """A linear layer without its adapter, if it has one."""
    return linear.to_wrap if is_adapted(linear) else linear


@torch.no_grad()
def merged_weight(linear: torch.nn.Module) -> torch.Tensor:
    """W of a linear layer; with an adapter W + (alpha / rank) B A, as a new tensor. This rank's part. Collective."""
    if not is_adapted(linear):
        return linear.get_parameter("weight")
    base, adapter = linear.to_wrap.get_parameter("weight"), linear.adapter
    a, b = adapter.linear_in.weight, adapter.linear_out.weight
    if adapter.input_is_parallel:  # W is cut along its input as A is; B along the rows that W has all of
        b = _gather_rows(b)
    else:  # W is cut along its output as B is; A along the rank
        a = _gather_rows(a)
    return torch.addmm(base, b, a, alpha=adapter.alpha / adapter.dim)


def _gather_rows(part: torch.Tensor) -> torch.Tensor:
    group = parallel.groups().tensor
    size = dist.get_world_size(group)
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _initialize(adapter: Adapter, seed: int) -> None:
    """Draw A whole on every rank (Xavier's uniform), and keep this rank's part; B is zero."""
    part = adapter.linear_in.weight
    dim = 1 if adapter.input_is_parallel else 0
    tp = parallel.tensor_parallel_size()
    shape = [size * tp if axis == dim else size for axis, size in enumerate(part.shape)]
    bound = (6.0 / sum(shape)) ** 0.5
    whole = (2.0 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1.0) * bound
    own = whole.chunk(tp, dim)[parallel.tensor_parallel_rank()]
    part.data.copy_(own)
    adapter.linear_out.weight.data.zero_()


def has_adapters(names: Iterable[str]) -> bool:
    """Whether some of a checkpoint's tensors are an adapter's."""
    return any(ADAPTER in name for name in names)


def save_peft(
    tensors: Iterator[tuple[str, torch.Tensor]], lora: Lora, target: Path, base: str, more_files: dict[str, str]
) -> None:
    """Write a directory that the library ``peft`` loads onto the base model; whole or not at all. Collective.

    Args:
        tensors: ``WeightMap.export_adapters``.
        target: replaced if it is there.
        base: name or path of the base model, as ``peft`` looks it up.
        more_files: text by file name.
    """
    named = {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors}  # q, k and v share one A
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.split(".")[-3] for name in named}),
        }
        texts = {"adapter_config.json": json.dumps(config, indent=2) + "\n", **more_files}
        with whole_directory(target) as partial:
            save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            hf_directory.write_texts(texts, partial)
            hf_directory.copy_companions(Path(base), partial, leave_out=("config.json", "generation_config.json"))
    dist.barrier()
