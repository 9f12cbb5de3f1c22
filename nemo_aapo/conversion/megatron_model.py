"""The Megatron side of a conversion: built for the present layout, filled, written, read. All of it is collective.

Torch's process group and Megatron's groups are there already (``mcore.groups``); their sizes are the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_aapo.checkpoint import checkpointer as checkpoint
from nemo_aapo.checkpoint import format as torch_dist
from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.config.schema import Lora
from nemo_aapo.conversion.source import ModelSource
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_all_ranks, on_first_rank
from nemo_aapo.errors import CheckpointError, DamagedCheckpointError
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.bridge.lora import add_adapters, has_adapters
from nemo_aapo.mcore.bridge.weights import WeightMap
from nemo_aapo.mcore.model import GPTModel, build_stage
from nemo_aapo.mcore.state import load_model_state, sharded_model_state
from nemo_aapo.models import writer as hf_directory
from nemo_aapo.utils.files import begin_directory, commit_directory, partial_of, remove_directory

LOOKS = 5
"""How often a run's newest checkpoint is looked for, where the one that was being read went away."""


def build(base: Path, dtype: torch.dtype, lora: Lora | None = None) -> tuple[WeightMap, GPTModel]:
    """The weight map of a model directory, and this rank's stage of the model with random weights.

    Args:
        base: needs no weights (``WeightMap``).
        dtype: of the weights.
        lora: adapters to add to them, as ``lora_of`` finds them in a run.
    """
    weight_map = WeightMap(str(base), dtype)
    layout = {
        "tensor_model_parallel_size": parallel.tensor_parallel_size(),
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size(),
        "expert_model_parallel_size": parallel.expert_parallel_size(),
    }
    module = build_stage(weight_map, {**precision.machine_fields(dtype), **layout})
    if lora is not None:
        add_adapters(module, lora, seed=0)  # drawn, and then overwritten
    module.eval()  # training, mcore wants sequence parallelism for experts with tensor parallelism
    return weight_map, module.to(dtype).requires_grad_(False)  # torch's norms begin in float32


def load_checkpoint(source: ModelSource, module: GPTModel, log: Callable[[str], None] = print) -> Manifest:
    """Verify a checkpoint and fill the module with its model part, whatever layout wrote it; the source is not touched.

    Of a run, the newest whole checkpoint is taken. It may still be training: a checkpoint that goes away while it is
    read is left for the newest one then.

    Args:
        log: told on rank 0 which damaged checkpoints were passed over.

    Raises:
        CheckpointError: on all ranks: no whole checkpoint.
    """
    problems: dict[str, str] = {}
    for _ in range(LOOKS):
        gone = False
        for path in on_first_rank(source.candidates, failure=CheckpointError):
            if path.name in problems:
                continue
            try:
                content = load_one(path, module)
            except CheckpointError as error:
                gone = not on_first_rank(path.exists, failure=CheckpointError)
                if gone and source.kind == "run":
                    break  # look again
                if source.kind != "run" or not isinstance(error, DamagedCheckpointError):
                    raise
                problems[path.name] = str(error)
                continue
            if problems and parallel.rank() == 0:
                log(f"WARNING: took {path.name}, since newer ones are damaged: {'; '.join(problems.values())}")
            return content
        if not gone:
            break
    reasons = "; ".join(problems.values()) or f"each went away while it was read ({LOOKS} times)"
    raise CheckpointError(f"{source.path}: no whole checkpoint: {reasons}")


def load_one(path: Path, module: GPTModel) -> Manifest:
    """Verify one checkpoint directory and read its model part into the module.

    Raises:
        DamagedCheckpointError, CheckpointError: on all ranks alike.
    """
    content = on_first_rank(lambda: manifest.read(path), failure=CheckpointError)
    checkpoint.check_files(path, content)
    header = on_first_rank(lambda: torch_dist.read_header(path), failure=CheckpointError)
    expected = sharded_model_state(module)
    if has_adapters(header.metadata.state_dict_metadata) and not has_adapters(expected):
        raise CheckpointError(f"{path} holds LoRA adapters, but no config.yaml of its run says which: name the run")
    load_model_state(module, torch_dist.read({"model": expected}, path, header)["model"])
    return content


def write(module: GPTModel, target: Path, base: Path, about: dict[str, Any]) -> None:
    """Write a Megatron model directory: mcore's torch_dist files, and the base model's configuration and tokenizer.

    It appears whole or not at all, with a manifest that holds a checksum of every file.

    Args:
        about: kept in the manifest as its ``trainer_state``.

    Raises:
        CheckpointError: on all ranks, if it failed on one.
    """
    partial = partial_of(target)

    def begin() -> None:
        begin_directory(target)
        hf_directory.copy_companions(base, partial)
        hf_directory.state_dtype(partial, module.config.params_dtype)

    def commit() -> None:
        manifest.write(whole, partial)
        commit_directory(partial, target)

    try:
        on_first_rank(begin, failure=CheckpointError)
        replicas = parallel.groups().data
        torch_dist.write(torch_dist.snapshot({"model": sharded_model_state(module)}, replicas, copied=False), partial)
        sealed = on_all_ranks(lambda: checkpoint.seal_own_files(partial), failure=CheckpointError)
        records = {name: record for part in sealed for name, record in part.items()}
        whole = Manifest(0, "", about, checkpoint.layout(), checkpoint.versions(), records)
        on_first_rank(commit, failure=CheckpointError)
    except CheckpointError:
        if parallel.rank() == 0:
            remove_directory(partial)
        raise
