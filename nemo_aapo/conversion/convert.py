"""The two conversions, for scripts and for other parts. Collective over the ranks of ``mcore.groups``.

    checkpoint_to_hf(find_source("results/math7b"), Path("math7b_hf"))     a run's newest checkpoint -> transformers
    hf_to_megatron(Path("/models/Qwen2.5-7B"), Path("qwen_megatron"))

Parallel sizes are those that Megatron's groups were made with, whatever wrote a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_aapo.checkpoint import format as torch_dist
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.config.schema import Lora
from nemo_aapo.conversion import megatron_model
from nemo_aapo.conversion.card import model_card
from nemo_aapo.conversion.source import ModelSource, lora_of
from nemo_aapo.distributed.agreement import agree, on_first_rank
from nemo_aapo.errors import CheckpointError, ConfigError
from nemo_aapo.mcore.bridge.lora import save_peft
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.models.families import require_convertible
from nemo_aapo.utils.safetensors import model_digest

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def checkpoint_to_hf(
    source: ModelSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = hf_directory.MAX_SHARD_BYTES,
    adapter: bool = False,
    log: Callable[[str], None] = print,
) -> Manifest:
    """The model part of a Megatron checkpoint as a Hugging Face directory. Collective.

    The optimizer's state is not read. Configuration, tokenizer, chat template and generation settings are the base
    model's; its weights are not needed. A model card is written.

    Args:
        source: a checkpoint, a run (its newest whole checkpoint, also while it trains), or what ``hf_to_megatron``
            wrote.
        target: must not exist; appears whole or not at all.
        dtype: of the written weights; None: that of the base model's. Adapters keep theirs.
        max_shard_bytes: a larger model is written in several files with an index.
        adapter: of a run that trains LoRA adapters, write these alone, as a directory that ``peft`` loads; otherwise
            they are merged into the weights.
        log: told on rank 0 what a reader should know.

    Returns:
        The manifest of the checkpoint that was taken: its step, and more.

    Raises:
        ConfigError: an architecture or target that can't be.
        CheckpointError: no whole checkpoint.
    """

    def check() -> Lora | None:
        require_convertible(source.base)
        _require_absent(target)
        lora = lora_of(source)
        if adapter and lora is None:
            raise ConfigError(f"{source.path} has no adapters: its run did not train with model.lora")
        return lora

    lora = agree(check)
    stored = stored_dtype(source)
    dtype = stored if adapter else dtype or agree(lambda: hf_directory.weights_dtype(source.base)) or stored
    weight_map, module = megatron_model.build(source.base, stored, lora)
    content = megatron_model.load_checkpoint(source, module, log)
    card = agree(lambda: model_card(source, content, hf_directory.dtype_name(dtype), adapter))
    if adapter and lora is not None:
        save_peft(weight_map.export_adapters(module), lora, target, str(source.base), {"README.md": card})
        return content
    weight_map.save(module, target, dtype=dtype, max_shard_bytes=max_shard_bytes, more_files={"README.md": card})
    return content


def hf_to_megatron(path: Path, target: Path, *, dtype: torch.dtype | None = None) -> None:
    """A Hugging Face model as a Megatron checkpoint of mcore's ``torch_dist`` format, which loads under any layout.

    Configuration, tokenizer, chat template and generation settings lie beside the weights. Collective.

    Args:
        path: the model directory.
        target: must not exist; appears whole or not at all.
        dtype: of the written weights; None: the model's own.

    Raises:
        ConfigError: an architecture, weights or target that can't be.
        CheckpointError: it could not be written.
    """

    def check() -> None:
        require_convertible(path)
        read_model_dir(str(path))
        _require_absent(target)

    agree(check)
    dtype = dtype or agree(lambda: hf_directory.weights_dtype(path)) or torch.float32
    weight_map, module = megatron_model.build(path, dtype)
    weight_map.load(module)
    digest = on_first_rank(lambda: model_digest(str(path)))
    about = {"converted_from": path.name, "model_digest": digest, "dtype": hf_directory.dtype_name(dtype)}
    megatron_model.write(module, target, path, about)


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype of a checkpoint's model part, from its header. Collective."""

    def read() -> torch.dtype:
        candidates = source.candidates()
        for path in candidates:
            try:
                tensors = torch_dist.weights(torch_dist.read_header(path))
            except Exception:  # gone, or damaged in whatever way: loading says which
                continue
            dtypes = {entry.properties.dtype for entry in tensors.values()}
            return dtypes.pop() if len(dtypes) == 1 else torch.float32
        names = ", ".join(path.name for path in candidates)
        raise CheckpointError(f"{source.path}: no checkpoint that can be read; damaged or half-written: {names}")

    return on_first_rank(read, failure=CheckpointError)


def _require_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already; name another place, or remove it")
