"""The one weight map: Hugging Face <-> Megatron, by Megatron-Bridge.

It imports the base model, exports the trained one, and feeds the refit of rollout engines that keep weights of their
own: what a round trip on CPU proves holds for all three.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.errors import Interrupted
from nemo_aapo.mcore.bridge.loader import auto_bridge_class
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.models.directory import architecture_of
from nemo_aapo.utils.files import whole_directory

TENSORS_BETWEEN_QUESTIONS = 16
"""Tensors that are exported between two questions whether to stop."""


class WeightMap:
    """Conversion between one Hugging Face directory's architecture and its Megatron twin."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        """
        Args:
            path: the model directory (already checked by ``read_model_dir``). Without weights in it, everything but
                ``load`` works.
            dtype: of the Megatron side.
        """
        self.path, self.dtype = path, dtype
        self.auto_bridge = auto_bridge_class(architecture_of(path)).from_hf_pretrained(path, torch_dtype=dtype)
        if not any(Path(path).glob("*.safetensors")):
            _name_tensors_by_architecture(self.auto_bridge.hf_pretrained)

    def provider(self) -> Any:
        """Megatron-Bridge's GPTModelProvider for the architecture, without weights."""
        provider = self.auto_bridge.to_megatron_provider(load_weights=False)
        if isinstance(provider.window_size, tuple | list):
            # The Bridge hands over transformers' sliding_window, which counts the token itself; mcore's left width
            # does not.
            provider.window_size = (provider.window_size[0] - 1, 0)
        return provider

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

    def export_adapters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor on CPU) of the adapters alone; ``export`` merges them. Collective."""
        for name, tensor in self.auto_bridge.export_adapter_weights([model], cpu=True, show_progress=False):
            yield name, tensor.detach()

    def names(self, model: torch.nn.Module) -> set[str]:
        """The Hugging Face names of all tensors that the map covers. Collective."""
        tasks = self.auto_bridge.get_conversion_tasks([model])
        covered = [task.mapping.hf_param for task in tasks if task is not None]
        return {name for part in covered for name in ([part] if isinstance(part, str) else part.values())}

    def save(
        self,
        model: torch.nn.Module,
        directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = hf_directory.MAX_SHARD_BYTES,
        more_files: Mapping[str, str] | None = None,
        stop: Callable[[], bool] = bool,
    ) -> None:
        """Write a Hugging Face directory that plain transformers loads; appears whole or not at all. Collective.

        Tokenizer, chat template and generation settings are those of the base model, byte for byte.

        Args:
            dtype: of the tensors, and named by ``config.json``; None: the model's, and ``config.json`` as it is.
            max_shard_bytes: a larger model is written in several files with an index.
            more_files: text by file name; rank 0's are written.
            stop: asked on every rank now and then; True on one breaks it off.

        Raises:
            Interrupted: on all ranks, as ``stop`` said so; nothing is left.
        """
        exported = _until(stop, self.export(model))
        tensors = ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in exported)
        if dist.get_rank() == 0:
            with whole_directory(Path(directory)) as partial:
                hf_directory.write_shards(tensors, partial, max_shard_bytes)
                hf_directory.copy_companions(Path(self.path), partial, dtype)
                hf_directory.write_texts(more_files or {}, partial)
        else:
            for _ in tensors:  # the other ranks' part in the collectives
                pass
        dist.barrier()


def _until(stop: Callable[[], bool], tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, unless a rank wants to stop. Collective, as making them is."""
    for number, named in enumerate(tensors):
        if number % TENSORS_BETWEEN_QUESTIONS == 0 and parallel.any_rank(stop())[0]:
            raise Interrupted
        yield named


def _name_tensors_by_architecture(pretrained: Any) -> None:
    """The Bridge orders its work by the names in the weight files; without these, by those that transformers uses."""
    from megatron.bridge.models.hf_pretrained.state import DictStateSource, StateDict
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(pretrained.config).state_dict()
    if pretrained.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    pretrained._state_dict_accessor = StateDict(DictStateSource(state))
