"""What a conversion is to do: its two sides and the layout to work in, checked by names of files only. No torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.conversion.source import ModelSource, check_base, find_source
from nemo_aapo.errors import ConfigError
from nemo_aapo.models import families
from nemo_aapo.models.directory import read_config_json, read_model_dir
from nemo_aapo.prepare.packages import MEGATRON, check_packages
from nemo_aapo.text.files import check_vocabulary
from nemo_aapo.utils.files import require_new
from nemo_aapo.utils.job import world_size_of_job
from nemo_aapo.utils.unforeseen import paths_refused


@dataclass(frozen=True)
class Layout:
    """The ranks to work in."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1

    @property
    def ranks(self) -> int:
        """All of them: as many on each stage as its layers and their experts are distributed over."""
        return math.lcm(self.tensor_parallel_size, self.expert_parallel_size) * self.pipeline_parallel_size

    def __str__(self) -> str:
        expert = f" with expert {self.expert_parallel_size}" if self.expert_parallel_size > 1 else ""
        return f"tensor {self.tensor_parallel_size} x pipeline {self.pipeline_parallel_size}{expert}"


@dataclass(frozen=True)
class ConversionJob:
    """A model, and what it is compared with or becomes."""

    source: ModelSource
    layout: Layout
    target: Path
    """Absolute; the new directory that is written, or the Hugging Face side of a comparison."""


@paths_refused()
def prepare_hf_to_megatron(path: Path, out: Path, layout: Layout) -> ConversionJob:
    """A Hugging Face directory that becomes a Megatron checkpoint.

    Raises:
        ConfigError: a model that is not converted, a layout that does not divide it, an output that can't be made.
    """
    source = ModelSource("hf", path.absolute(), path.absolute())
    _require_source(source, layout)
    return ConversionJob(source, layout, _new(out))


@paths_refused()
def prepare_megatron_to_hf(path: Path, base: Path | None, out: Path, layout: Layout) -> ConversionJob:
    """A Megatron checkpoint, or the newest of a run, that becomes a Hugging Face directory.

    Raises:
        ConfigError: as ``prepare_hf_to_megatron``; or it is a Hugging Face model already.
    """
    found = find_source(path, base)
    if found.kind == "hf":
        raise ConfigError(f"{found.path} is a Hugging Face model already")
    _require_source(found, layout)
    return ConversionJob(found, layout, _new(out))


@paths_refused()
def prepare_verification(path: Path, base: Path | None, hf: Path | None, layout: Layout) -> ConversionJob:
    """A Megatron checkpoint beside a Hugging Face directory, or this alone, which is converted in memory.

    Raises:
        ConfigError: as ``prepare_hf_to_megatron``; or not one side of each kind.
    """
    found = find_source(path, base)
    if (found.kind == "hf") != (hf is None):
        raise ConfigError("verify HF_DIR converts in memory; verify MEGATRON HF_DIR compares the two")
    _require_source(found, layout)
    if hf is not None:
        _require_whole(hf.absolute())
    return ConversionJob(found, layout, found.path if hf is None else hf.absolute())


def _require_whole(directory: Path) -> None:
    families.require_convertible(directory)
    read_model_dir(str(directory))


def _require_source(source: ModelSource, layout: Layout) -> None:
    sizes = layout.tensor_parallel_size, layout.pipeline_parallel_size, layout.expert_parallel_size
    families.require_layout(source.base, *sizes)
    check_base(source)
    _require_rows(source.base)
    if source.kind == "hf":
        _require_whole(source.path)
    if "WORLD_SIZE" in os.environ and (started := world_size_of_job()) != layout.ranks:
        raise ConfigError(
            f"{started} ranks were started, but {layout} = {layout.ranks}: leave torchrun away, or start as many"
        )
    check_packages(MEGATRON)


def _require_rows(base: Path) -> None:
    """Refuse a tokenizer that gives ids which the model has no row for; a model may come without one."""
    if isinstance(rows := read_config_json(base).get("vocab_size"), int):
        check_vocabulary(base, rows)


def _new(out: Path) -> Path:
    """The output, absolute, which is not there yet. Ranks that a launcher started look themselves, together."""
    if "RANK" not in os.environ:
        require_new(out, f"--out {out}")
    return out.absolute()
