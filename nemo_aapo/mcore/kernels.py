"""Which fused kernels a policy computes with, and why not where it does not.

It is read off what megatron-core itself decided at import (which Adam, whether TransformerEngine is there) and off the
fields that ``mcore/precision.py`` sets.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aapo import lines

FEW_OPERATIONS = "a few torch operations"
"""What ``mcore/cpu/kernels.py`` is made of."""

_FROM, _BELOW = (".".join(map(str, bound)) for bound in lines.installed().transformer_engine)
GET_TRANSFORMER_ENGINE = f"install TransformerEngine >= {_FROM}, < {_BELOW} (the Dockerfile's image has it)"


@dataclass(frozen=True, slots=True)
class Libraries:
    """What there is to compute with."""

    gpu: bool
    transformer_engine: str | None
    """Its version; None: mcore does without."""
    adam: str
    """The package that mcore took Adam from: transformer_engine, apex or torch."""
    rope: bool
    """mcore found a fused rotary embedding."""
    flash_attn: str | None
    """Version of the package flash-attn."""
    cudnn: str | None
    """Version of torch's cuDNN."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel in one configuration."""

    name: str
    in_use: bool
    text: str
    """What computes it, and why no fused kernel where it is none."""
    remedy: str = ""
    """How to have it; empty where it is in use, or can't be had on this machine."""

    def __str__(self) -> str:
        return f"{self.name}: {'fused' if self.in_use else 'not fused'}, {self.text}"


@functools.cache
def libraries() -> Libraries:
    """The libraries that this process computes with. Imports torch and mcore."""
    import torch
    from megatron.core import optimizer
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.common.embeddings import rope_utils

    gpu = torch.cuda.is_available()
    return Libraries(
        gpu=gpu,
        transformer_engine=importlib.metadata.version("transformer_engine") if HAVE_TE else None,
        adam="torch" if optimizer.USING_PYTORCH_OPTIMIZER or not gpu else optimizer.Adam.__module__.partition(".")[0],
        rope=rope_utils.fused_apply_rotary_pos_emb is not None,
        flash_attn=_version("flash-attn"),
        cudnn=str(torch.backends.cudnn.version()) if gpu and torch.backends.cudnn.is_available() else None,
    )


def fused_kernels(
    fields: Mapping[str, Any],
    there: Libraries,
    *,
    offloaded: float = 0.0,
    environment: Mapping[str, str] = os.environ,
) -> tuple[Kernel, ...]:
    """Each kernel, whether it is in use, and if not why.

    Args:
        fields: of mcore's TransformerConfig, as ``precision.model_fields`` returns them.
        there: what ``libraries()`` found.
        offloaded: ``model.optim.cpu_offload_fraction``.
        environment: TransformerEngine's switches of attention (``NVTE_FLASH_ATTN``, ``NVTE_FUSED_ATTN``).
    """
    from nemo_aapo.mcore.precision import transformer_engine_layer_spec

    te_layers = fields["transformer_layer_spec"] is transformer_engine_layer_spec
    return (
        _weight_gradient(te_layers, there),
        _adam(offloaded, there),
        _norm(te_layers, there),
        _attention(te_layers, there, environment),
        _by_field("RoPE", fields["apply_rope_fusion"] and there.rope, "TransformerEngine", FEW_OPERATIONS, there),
        _swiglu(fields["bias_activation_fusion"], there),
    )


def _weight_gradient(te_layers: bool, there: Libraries) -> Kernel:
    """``precision.fuse_weight_gradients`` tells TransformerEngine's layers or, on a CPU, mcore's own."""
    if not there.gpu:
        return _no_gpu("weight gradients", "torch's products, which add them to the fp32 buffer", in_use=True)
    in_use = te_layers and there.transformer_engine is not None
    fused = "TransformerEngine's linear layers add them to the fp32 buffer within the product"
    return _by_field("weight gradients", in_use, fused, "autograd, then an addition", there)


def _adam(offloaded: float, there: Libraries) -> Kernel:
    on_host = f", {offloaded:.0%} of it on the host by torch's AdamW" if offloaded else ""
    if there.adam != "torch":
        return Kernel("Adam", True, f"FusedAdam of {there.adam}{on_host}")
    if not there.gpu:
        return _no_gpu("Adam", "torch's fused AdamW", in_use=True)
    return Kernel("Adam", False, "torch's AdamW: neither TransformerEngine nor apex imports", GET_TRANSFORMER_ENGINE)


def _norm(te_layers: bool, there: Libraries) -> Kernel:
    if te_layers and there.transformer_engine:
        return Kernel("RMSNorm", True, "TransformerEngine, in one with the linear layer behind it")
    return _by_field("RMSNorm", False, "", FEW_OPERATIONS, there)


def _attention(te_layers: bool, there: Libraries, environment: Mapping[str, str]) -> Kernel:
    if not there.gpu:
        return _no_gpu("attention", "torch's scaled_dot_product_attention", in_use=True)
    if not (te_layers and there.transformer_engine):
        return _by_field("attention", False, "", "mcore's softmax over whole score matrices", there)
    allowed = {
        f"flash-attn {there.flash_attn}": there.flash_attn and environment.get("NVTE_FLASH_ATTN", "1") != "0",
        f"cuDNN {there.cudnn}": there.cudnn and environment.get("NVTE_FUSED_ATTN", "1") != "0",
    }
    if kernels := [name for name, is_allowed in allowed.items() if is_allowed]:
        return Kernel("attention", True, f"TransformerEngine, which picks by shape: {' or '.join(kernels)}")
    switched = [f"{key}=0" for key in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN") if environment.get(key) == "0"]
    why = f"{' and '.join(switched)} in the environment" if switched else "neither flash-attn nor cuDNN is there"
    return Kernel("attention", False, f"TransformerEngine's unfused one: {why}", "unset it" if switched else "install")


def _swiglu(asked: bool, there: Libraries) -> Kernel:
    return _by_field("SwiGLU", asked, "mcore's bias_swiglu, compiled by torch", FEW_OPERATIONS, there)


def _by_field(name: str, in_use: bool, fused: str, plain: str, there: Libraries) -> Kernel:
    """A kernel that the layer specification or a field decides, as ``mcore/precision.py`` sets it."""
    if in_use:
        return Kernel(name, True, fused)
    if not there.gpu:
        return _no_gpu(name, plain)
    if there.transformer_engine is None:
        return Kernel(name, False, f"{plain}: TransformerEngine does not import", GET_TRANSFORMER_ENGINE)
    return Kernel(name, False, f"{plain}: mcore/precision.py leaves it off")


def _no_gpu(name: str, plain: str, *, in_use: bool = False) -> Kernel:
    return Kernel(name, in_use, f"{plain}: no GPU")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
