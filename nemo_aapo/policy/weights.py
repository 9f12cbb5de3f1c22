"""The one weight map: Hugging Face <-> Megatron, by Megatron-Bridge.

It imports the base model, exports the trained one, and feeds the refit of rollout engines that keep weights of their
own: what a round trip on CPU proves holds for all three.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.policy.bridge import auto_bridge_class
from nemo_aapo.policy.model_dir import architecture_of

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


class WeightMap:
    """Conversion between one Hugging Face directory's architecture and its Megatron twin."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        """Args: path: the model directory (already checked by ``read_model_dir``). dtype: of the Megatron side."""
        self.path = path
        self.auto_bridge = auto_bridge_class(architecture_of(path)).from_hf_pretrained(path, torch_dtype=dtype)

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
