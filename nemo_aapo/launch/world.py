"""Where the ranks of a job run: how many there are, and what machine they find. No torch: milliseconds."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from nemo_aapo.config import PRECISIONS, Config, EvaluationConfig, kind_of, with_machine_defaults
from nemo_aapo.config.precision import check_optimizer
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.local import world_size_of
from nemo_aapo.utils.job import check_rendezvous, world_size_of_job


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides the settings that are left to the machine (``precision=auto``, nulls)."""

    gpu: str | None
    """Name of the GPU that torch will use; None: there is none."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability of that GPU."""
    cuda: tuple[int, int] = (0, 0)
    """Version of CUDA that torch was built for."""
    transformer_engine: bool = False
    """Whether the package is there."""

    @classmethod
    def present(cls) -> Machine:
        """This machine; its first visible GPU stands for all. A GPU counts only where torch is built for CUDA."""
        transformer_engine = PathFinder.find_spec("transformer_engine") is not None
        cuda = _cuda_of_torch()
        found = _first_gpu() if cuda else None
        if found is None or cuda is None:
            return cls(None, transformer_engine=transformer_engine)
        return cls(*found, cuda, transformer_engine)


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a job."""

    size: int
    machine: Machine | None
    """None: not known, as Slurm will start the ranks on other machines than this one."""


def of_rank(config: Config) -> World:
    """The job that this process is one rank of, alone or started by torchrun, ``srun`` or a launcher.

    Raises:
        ConfigError: ``dry_run``, which only launchers heed; half of what torchrun sets.
    """
    if config.dry_run:
        raise ConfigError("dry_run=true has an effect with scripts/launch.py only")
    check_rendezvous()
    return World(world_size_of_job(), Machine.present())


def of_launcher(config: Config) -> World:
    """The ranks that ``launch.py`` will start: here, or on machines that this one does not know.

    Raises:
        ConfigError: several nodes, but nothing that could start ranks on them.
    """
    local = config.cluster.kind == "local"
    if local and config.trainer.num_nodes != 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: cluster=local starts ranks on this machine only. "
            "Set trainer.num_nodes=1 and trainer.devices to the number of ranks"
        )
    return World(config.trainer.num_nodes * config.trainer.devices, Machine.present() if local else None)


def of_starter(config: Config | EvaluationConfig) -> World:
    """The ranks that do the work of a command which starts them itself, unless it is one of them already."""
    return World(world_size_of(config), Machine.present())


def check_place(config: Config, typed: Sequence[str]) -> None:
    """Refuse to do here, on a login node perhaps, what was typed to be done in a job.

    What a config file says of the job has no effect here: the one that a launcher has frozen is what its ranks read,
    and may be started by hand.

    Args:
        typed: the ``KEY=VALUE`` words of a command that starts no job.
    """
    for word in typed if config.cluster.kind != "local" else ():
        if re.match(r"\+*cluster[.=]", word):
            raise ConfigError(
                f"cluster.kind={config.cluster.kind} has an effect with scripts/launch.py only, which starts the job. "
                f"To start here, leave out {word}"
            )


def decide(config: Config, machine: Machine) -> Config:
    """The configuration with what it leaves to the machine decided (``precision=auto``, nulls). Idempotent.

    Raises:
        ConfigError: this machine can't do what is asked for; says why, and what it can do.
    """
    config = with_machine_defaults(config, on_gpu=machine.gpu is not None)
    check_optimizer(config.model)  # again, with the optimizer that was left to the machine
    if problem := refusal(config, machine):
        raise ConfigError(problem)
    return config


def refusal(config: Config, machine: Machine) -> str | None:
    """Why a machine can't run a configuration whose precision is decided; None if it can."""
    name, kind = config.precision.name, kind_of(config)
    if machine.gpu is None:
        if kind.bf16:
            return f"precision={name} needs a GPU with TransformerEngine; on CPU use precision=fp32"
        if config.model.optim.cpu_offload_fraction or config.rollout.offload_learner:
            return (
                "model.optim.cpu_offload_fraction and rollout.offload_learner move what lies in GPU memory, and there "
                "is no GPU: set them to 0 and false"
            )
        return None
    if config.model.share_prompts and (not kind.bf16 or config.model.context_parallel_size > 1):
        return (
            f"model.share_prompts=true with precision={name} and model.context_parallel_size="
            f"{config.model.context_parallel_size} on a GPU: the kernels for shared prompts take bf16 only, and rows "
            "that are not cut; set it to false, or precision=bf16 and model.context_parallel_size=1"
        )
    if config.model.context_parallel_size > 1 and not kind.bf16:
        return (
            f"model.context_parallel_size={config.model.context_parallel_size} with precision={name} on a GPU: "
            "TransformerEngine cuts sequences with flash-attn or cuDNN only, which take no fp32; use precision=bf16"
        )
    if not machine.transformer_engine:
        return f"precision={name} on a GPU needs TransformerEngine, which is not installed; see the Dockerfile"
    if machine.capability < kind.min_capability:
        return (
            f"precision={name} needs a GPU of compute capability {_dotted(kind.min_capability)}, and {machine.gpu} has "
            f"{_dotted(machine.capability)}: use {_best(machine)}"
        )
    if machine.cuda < kind.min_cuda:
        return (
            f"precision={name} needs CUDA {_dotted(kind.min_cuda)}, and torch was built for {_dotted(machine.cuda)}: "
            f"use {_best(machine)}"
        )
    if kind.below_capability and machine.capability >= kind.below_capability:
        return (
            f"precision={name} is for Hopper; TransformerEngine has other block formats on {machine.gpu}, which are "
            f"not wired here: use {_best(machine)}"
        )
    if config.rollout.offload_learner and not kind.bf16:
        return (
            f"rollout.offload_learner=true with precision={name}: fp32 weights are their own optimizer copy and can't "
            "leave the GPU while an engine draws from them. Use precision=bf16"
        )
    return None


def _best(machine: Machine) -> str:
    """What to use instead."""
    usable = [
        name
        for name in ("fp8_tensorwise", "bf16", "fp32")
        if machine.capability >= PRECISIONS[name].min_capability and machine.cuda >= PRECISIONS[name].min_cuda
    ]
    return " or ".join(f"precision={name}" for name in usable)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# ---------------------------------------------------------------- looking without torch


def _cuda_of_torch() -> tuple[int, int] | None:
    """The CUDA version that the installed torch was built for; None: a CPU build, or no torch."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b.*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def _first_gpu() -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of the first GPU that CUDA will show, by NVML; None: there is none.

    NVML is asked and not CUDA: a process that has initialised CUDA can't fork others that use it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    with _nvml() as nvml:
        if nvml is None:
            return None
        device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        major, minor = ctypes.c_int(), ctypes.c_int()
        if first.startswith("GPU-"):
            found = nvml.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(device))
        else:  # a number; or a part of a GPU (MIG-...), of which NVML does not say what the whole can do
            number = int(first) if first.isdecimal() else 0
            found = nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device))
        if found != 0:
            return None
        nvml.nvmlDeviceGetName(device, name, len(name))
        nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return name.value.decode(errors="replace"), (major.value, minor.value)


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """NVIDIA's management library, initialised; None where there is no driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()
