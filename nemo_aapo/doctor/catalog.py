"""The catalogue of all checks, in the order in which they run: cheap ones first, and those that others build on."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aapo.doctor.checks import collectives, files, gpu, memory, model, parity, rewards, slurm, versions
from nemo_aapo.doctor.finding import Check
from nemo_aapo.errors import ConfigError

CHECKS = (
    Check("versions", versions.versions, 30, on="node", quick=True),
    Check("gpu", gpu.gpu, 90, on="node", quick=True),
    Check("fp8", gpu.fp8, 90, on="node", quick=True),
    Check("transformer_engine", gpu.transformer_engine, 180, on="node", quick=True),
    Check("apex", gpu.apex, 180, on="node", quick=True),
    Check("tensorrt_llm", gpu.tensorrt_llm, 120, on="node", quick=True),
    Check("ray", gpu.ray, 60, on="node", quick=True),
    Check("allocator", gpu.allocator, 15, on="node", quick=True),
    Check("slurm", slurm.slurm_tools, 30),
    Check("ports", slurm.ports, 15, quick=True),
    Check("all_reduce", collectives.all_reduce, 240, on="rank", together=True),
    Check("model", model.model, 120, needs_config=True, on="node"),
    Check("tokenizer", model.tokenizer, 180, needs_config=True, on="node"),
    Check("kernels", gpu.kernels, 180, needs_config=True, on="node"),
    Check("file_system", files.file_system, 180, needs_config=True, on="node"),
    Check("shared_files", files.shared_files, 90, needs_config=True, on="rank", together=True, after=("file_system",)),
    Check("disk", files.disk, 90, needs_config=True, on="node", after=("model",)),
    Check("memory", memory.memory, 120, needs_config=True, on="node", after=("model",)),
    Check("rewards", rewards.rewards, 300, needs_config=True, on="node"),
    Check("parity", parity.parity, 900, True, on="rank", together=True, after=("all_reduce", "model", "tokenizer")),
)
NAMES = tuple(check.name for check in CHECKS)


def select(only: Sequence[str], skip: Sequence[str], quick: bool) -> list[Check]:
    """The checks that the options select, in the catalogue's order.

    Raises:
        ConfigError: an unknown name, or none left.
    """
    for name in (*only, *skip):
        if name not in NAMES:
            raise ConfigError(f"there is no check {name!r}; there are {', '.join(NAMES)}")
    chosen = [
        check
        for check in CHECKS
        if (not only or check.name in only) and check.name not in skip and (check.quick or not quick)
    ]
    if not chosen:
        raise ConfigError("no check is left: see --only, --skip and --quick")
    return chosen
