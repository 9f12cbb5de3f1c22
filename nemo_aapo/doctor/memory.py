"""Free memory against what the chosen configuration needs at least."""

from __future__ import annotations

from pathlib import Path

from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.doctor.sizes import on_this_machine, readable, training_bytes
from nemo_aapo.doctor.versions import has_gpu
from nemo_aapo.policy.model_dir import read_model_dir

CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and usage below /sys/fs/cgroup, version 2 and version 1."""
DEVICE_PARTS = "weights, gradients, optimizer"
REMEDY = "raise the tensor- or pipeline-parallel size, or use machines with more memory"


def memory(context: Context) -> list[Finding]:
    """The host's memory for all ranks of this machine, and a GPU's for one."""
    config, ranks = on_this_machine(context.config), ranks_here(context)
    device, besides = training_bytes(config, read_model_dir(config.model.path))
    on_gpu = has_gpu()
    host_need = ranks * (besides if on_gpu else device + besides)
    parts = "copies for reference and checkpoint" if on_gpu else f"{DEVICE_PARTS}, copies for reference and checkpoint"
    found = [judge("host_memory", host_need, free_host_memory(), f"{parts}; ranks here: {ranks}")]
    if on_gpu:
        import torch

        free, _ = torch.cuda.mem_get_info(context.place.local_rank)
        found.append(judge("gpu_memory", device, free, DEVICE_PARTS))
    return found


def ranks_here(context: Context) -> int:
    """Of this machine: those that were started, else those that the configuration will have started."""
    place = context.place
    return place.local_world_size if place.world_size > 1 else context.config.trainer.devices


def judge(name: str, need: int, free: int, what: str) -> Finding:
    """Args: need, free: bytes. The need is a lower bound: activations, caches and libraries come on top."""
    text = f"{readable(free)} free, at least {readable(need)} needed ({what})"
    if need > free:
        return Finding(name, "failure", text, REMEDY)
    if need > 0.8 * free:
        return Finding(name, "warning", f"{text}: little is left for activations and caches", REMEDY)
    return Finding(name, "ok", text)


def free_host_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes, of the machine or of the container or job that this process is in."""
    import psutil

    free = [psutil.virtual_memory().available]
    for limit, usage in CGROUPS:
        try:
            free.append(int((root / limit).read_text()) - int((root / usage).read_text()))
        except (OSError, ValueError):  # not this version, or "max"
            continue
    return min(free)
