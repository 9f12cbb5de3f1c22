"""The one weight map: Hugging Face <-> Megatron, by Megatron-Bridge.

It imports the base model, exports the trained one, and feeds the refit of rollout engines that keep weights of their
own: what a round trip on CPU proves holds for all three.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.mcore.bridge.loader import auto_bridge_class
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.models.directory import architecture_of
from nemo_aapo.models.reader import WeightFiles
from nemo_aapo.utils.files import whole_directory


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
            directory: weights of the same architecture; None: the model directory's own.
        """
        from megatron.bridge.models.hf_pretrained.state import DictStateSource, StateDict

        # The Bridge's own source of tensors keeps the index of every directory that it ever read (state.py:840).
        pretrained, files = self.auto_bridge.hf_pretrained, WeightFiles(Path(directory or self.path))
        before, pretrained._state_dict_accessor = pretrained._state_dict_accessor, StateDict(DictStateSource(files))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the Bridge draws a bar of its own
                self.auto_bridge.load_hf_weights([model])
        finally:
            pretrained._state_dict_accessor = before

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
    ) -> None:
        """Write a Hugging Face directory that plain transformers loads; appears whole or not at all. Collective.

        Tokenizer, chat template and generation settings are those of the base model, byte for byte.

        Args:
            dtype: of the tensors, and named by ``config.json``; None: the model's, and ``config.json`` as it is.
            max_shard_bytes: a larger model is written in several files with an index.
            more_files: text by file name; rank 0's are written.
        """
        tensors = ((name, tensor if dtype is None else tensor.to(dtype)) for name, tensor in self.export(model))
        if dist.get_rank() == 0:
            with whole_directory(Path(directory)) as partial:
                hf_directory.write_shards(tensors, partial, max_shard_bytes)
                hf_directory.copy_companions(Path(self.path), partial, dtype)
                hf_directory.write_texts(more_files or {}, partial)
        else:
            for _ in tensors:  # the other ranks' part in the collectives
                pass
        dist.barrier()


def _name_tensors_by_architecture(pretrained: Any) -> None:
    """The Bridge orders its work by the names in the weight files; without these, by those that transformers uses."""
    from megatron.bridge.models.hf_pretrained.state import DictStateSource, StateDict
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(pretrained.config).state_dict()
    if pretrained.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    pretrained._state_dict_accessor = StateDict(DictStateSource(state))
