"""The one weight map: Hugging Face <-> Megatron, by Megatron-Bridge.

It imports the base model, exports the trained one, and feeds the refit of rollout engines that keep weights of their
own: what a round trip on CPU proves holds for all three.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OPTIONAL_DEPENDENCIES = ("transformer_engine", "triton", "mamba_ssm", "causal_conv1d", "mlflow", "timm", "modelopt")
"""Packages that Megatron-Bridge imports at module level for models and features that we don't use."""

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""What an exported model takes over from its base model."""

CORE_FIRST = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.models.vision.clip_vit_model",
    "megatron.core.models.T5.t5_model",
    "megatron.core.models.multimodal.llava_model",
    "megatron.core.post_training.modelopt.gpt.model_specs",
)
"""mcore modules that decide at import time whether TransformerEngine is there: they must see the truth."""


class WeightMap:
    """Conversion between one Hugging Face directory's architecture and its Megatron twin."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        """Args: path: the model directory (already checked by ``read_model_dir``). dtype: of the Megatron side."""
        self.path = path
        self.auto_bridge = _auto_bridge_class().from_hf_pretrained(path, torch_dtype=dtype)

    def provider(self) -> Any:
        """Megatron-Bridge's GPTModelProvider for the architecture, without weights."""
        return self.auto_bridge.to_megatron_provider(load_weights=False)

    def load(self, model: torch.nn.Module, directory: str | os.PathLike | None = None) -> None:
        """Fill the Megatron model (this rank's part), tensor by tensor. Collective.

        Args:
            directory: weights of the same architecture, with a ``config.json``; None: the model directory's own.
                The Bridge remembers which tensor is in which file, so a directory must not change once it was read.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # the Bridge draws a bar of its own
            self.auto_bridge.load_hf_weights([model], None if directory is None else str(directory))

    def export(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor on CPU), vocabulary padding stripped. Collective; all ranks get all."""
        for name, tensor in self.auto_bridge.export_hf_weights([model], cpu=True, show_progress=False):
            yield name, tensor.detach()

    def save(self, model: torch.nn.Module, directory: str | os.PathLike) -> None:
        """Write a Hugging Face directory that plain transformers loads; appears whole or not at all. Collective.

        Configuration, tokenizer and chat template are those of the base model, byte for byte.
        """
        target = Path(directory)
        partial = target.with_name(target.name + ".partial")
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with contextlib.redirect_stdout(io.StringIO()):  # and reports success on stdout
            self.auto_bridge.save_hf_weights([model], partial, show_progress=False)
        if first:
            for pattern in COMPANION_FILES:
                for file in Path(self.path).glob(pattern):
                    shutil.copyfile(file, partial / file.name)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        dist.barrier()


def _auto_bridge_class() -> Any:
    """``megatron.bridge.AutoBridge``, imported without the GPU-only packages it names at module level."""
    for name in CORE_FIRST:
        importlib.import_module(name)
    absent = {name for name in OPTIONAL_DEPENDENCIES if importlib.util.find_spec(name) is None}
    finder = _StandInFinder(absent)
    sys.meta_path.append(finder)
    try:
        bridge = importlib.import_module("megatron.bridge")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
            del sys.modules[name]  # so that `import transformer_engine` fails honestly afterwards
    _scatter_contiguous()
    return bridge.AutoBridge


def _scatter_contiguous() -> None:
    """gloo's scatter misreads non-contiguous tensors without an error: every row-parallel weight would arrive wrong."""
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    scatter = MegatronParamMapping.scatter_to_tp_ranks
    if getattr(scatter, "contiguous", False):
        return

    def scatter_to_tp_ranks(self, splits, *args, **kwargs):
        splits = [split.contiguous() for split in splits] if splits else splits
        return scatter(self, splits, *args, **kwargs)

    scatter_to_tp_ranks.contiguous = True
    MegatronParamMapping.scatter_to_tp_ranks = scatter_to_tp_ranks


class _StandIn(type):
    """A class that answers any attribute with another stand-in, serves as a decorator, and can't be instantiated."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls.__name__}.{name}")


def _stand_in(name: str) -> type:
    def new(cls, *args, **kwargs):
        if not kwargs and len(args) == 1 and callable(args[0]):
            return args[0]  # @triton.jit
        if not args:
            return lambda function: function  # @triton.autotune(...)
        raise ImportError(f"{name} is not installed")

    return _StandIn(name, (), {"__new__": new})


class _StandInModule(types.ModuleType):
    __path__: tuple[str, ...] = ()
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _stand_in(name)
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages, and only them."""

    def __init__(self, absent: set[str]) -> None:
        self.absent = absent

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.absent:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandInModule(spec.name)

    def exec_module(self, module):
        """Nothing to run."""
