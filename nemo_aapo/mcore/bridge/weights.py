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
from nemo_aapo.mcore.bridge import families
from nemo_aapo.mcore.bridge.loader import auto_bridge_class
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.models.directory import first_architecture, read_config_json, shape_of
from nemo_aapo.models.reader import WeightFiles
from nemo_aapo.models.weights import expected_tensors, own_tensors
from nemo_aapo.text import transformers5
from nemo_aapo.utils.files import whole_directory
from nemo_aapo.utils.safetensors import has_weights, tensor_headers

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
        config = read_config_json(Path(path))
        architecture = first_architecture(config)
        self.auto_bridge = auto_bridge_class(architecture).from_hf_pretrained(path, torch_dtype=dtype)
        pretrained = self.auto_bridge.hf_pretrained
        pretrained.config = transformers5.translated_config(Path(path), config)
        shape = shape_of(config)
        tensors: Mapping[str, torch.Tensor]
        if has_weights(Path(path)):
            tensors = WeightFiles(Path(path), own_tensors(tensor_headers(Path(path)), shape))
        else:  # the Bridge orders its work by their names
            tensors = {name: torch.empty(size, device="meta") for name, size in expected_tensors(shape).items()}
        pretrained._state_dict_accessor = _state(tensors)

    def provider(self) -> Any:
        """Megatron-Bridge's GPTModelProvider for the architecture, without weights."""
        provider = self.auto_bridge.to_megatron_provider(load_weights=False)
        families.adapt(provider, self.auto_bridge.hf_pretrained.config)
        if provider.num_moe_experts:
            # The weights of the chosen experts are their share in the softmax over all of them, or over those alone.
            provider.moe_router_pre_softmax = not self.auto_bridge.hf_pretrained.config.norm_topk_prob
        return provider

    def load(
        self, model: torch.nn.Module, weights: str | os.PathLike | Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Fill the Megatron model (this rank's part), tensor by tensor. Collective.

        Args:
            weights: a directory or tensors by name, of the same architecture, and no other tensors; None: the model
                directory's own.
        """
        pretrained = self.auto_bridge.hf_pretrained
        own = pretrained._state_dict_accessor
        try:
            if weights is not None:
                tensors = weights if isinstance(weights, Mapping) else WeightFiles(Path(weights))
                pretrained._state_dict_accessor = _state(tensors)
            with contextlib.redirect_stdout(io.StringIO()):  # the Bridge draws a bar of its own
                self.auto_bridge.load_hf_weights([model])
        finally:
            pretrained._state_dict_accessor = own

    def export(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor where the weights lie), vocabulary padding stripped. Collective; all get all.

        An engine on the same GPUs reads them there; who needs them in host memory takes them there.
        """
        for name, tensor in self.auto_bridge.export_hf_weights([model], cpu=False, show_progress=False):
            yield name, tensor.detach()

    def export_adapters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor on CPU) of the adapters alone; ``export`` merges them. Collective."""
        for name, tensor in self.auto_bridge.export_adapter_weights([model], cpu=True, show_progress=False):
            yield name, tensor.detach()

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

        Configuration, tokenizer, chat templates and generation settings are those of the base model, byte for byte,
        but that ``config.json`` names the written dtype and no quantization.

        Args:
            dtype: of the tensors; None: that of the base model's, whatever the Megatron side computes in.
            max_shard_bytes: a larger model is written in several files with an index.
            more_files: text by file name; rank 0's are written.
            stop: asked on every rank now and then; True on one breaks it off.

        Raises:
            Interrupted: on all ranks, as ``stop`` said so; nothing is left.
        """
        tensors = _until(stop, self.export(model))
        if dist.get_rank() == 0:
            written = dtype or hf_directory.weights_dtype(Path(self.path)) or self.dtype
            with whole_directory(Path(directory)) as partial:
                cast = ((name, tensor.to("cpu", written)) for name, tensor in tensors)
                hf_directory.write_shards(cast, partial, max_shard_bytes)
                hf_directory.copy_companions(Path(self.path), partial)
                hf_directory.state_dtype(partial, written)
                hf_directory.write_texts(more_files or {}, partial)
        else:
            for _ in tensors:  # the other ranks' part in the collectives
                pass
        dist.barrier()


def _state(tensors: Mapping[str, torch.Tensor]) -> Any:
    """Tensors by name, as the Bridge reads them. Its own reader keeps the index of every directory that it ever read
    (state.py:840), and takes any ``*.safetensors`` where there is no index."""
    from megatron.bridge.models.hf_pretrained.state import DictStateSource, StateDict

    return StateDict(DictStateSource(tensors))


def _until(stop: Callable[[], bool], tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, unless a rank wants to stop. Collective, as making them is."""
    for number, named in enumerate(tensors):
        if number % TENSORS_BETWEEN_QUESTIONS == 0 and parallel.any_rank(stop())[0]:
            raise Interrupted
        yield named
