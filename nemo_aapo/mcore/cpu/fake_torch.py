"""The module ``torch`` as mcore sees it where there is no GPU: what it asks of CUDA is answered for the CPU.

mcore asks for ``torch.cuda.current_device()`` and for literal ``device="cuda"`` in many places that have nothing to do
with CUDA kernels. Only mcore's own modules get these answers, by a global name of each; torch itself, which everybody
else in the process sees, stays as it is. (A ``TorchFunctionMode`` would catch the literals, but costs 20 to 27 % of a
step.)
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

MODULES = (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.dot_product_attention",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.module",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
"""Modules of mcore that name CUDA and that some run on a CPU passes through."""


def give(modules: Iterable[str]) -> None:
    """Have these modules see this ``torch``."""
    fake = _fake_torch()
    for name in modules:
        vars(importlib.import_module(name))["torch"] = fake


def _fake_torch() -> types.ModuleType:
    """All of torch, with the CPU as its current device and factories that read ``cuda`` as the CPU."""
    cuda = _like(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda device=None: torch.cpu.current_stream(),
        synchronize=lambda device=None: None,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in ("zeros", "ones", "empty", "full", "tensor")}
    return _like(torch, cuda=cuda, **factories)


def _like(module: types.ModuleType, **others: Any) -> types.ModuleType:
    """A module with these attributes, and all others of the given one as they are when they are asked for."""
    fake = types.ModuleType(module.__name__)
    vars(fake).update(others, __getattr__=lambda name: getattr(module, name))
    return fake


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create
