"""Checks that free memory covers what the chosen configuration needs at least."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from nemo_aapo.config import Config
from nemo_aapo.doctor.checks.sizes import on_this_machine, readable
from nemo_aapo.doctor.checks.versions import has_gpu
from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.planning import hardware, models
from nemo_aapo.planning.inputs import Inputs, Question, plan_inputs
from nemo_aapo.planning.memory import rank_memory, server_memory

CGROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Controller in /proc/self/cgroup, none in version 2 -> its folder below /sys/fs/cgroup, a group's files with limit and
usage, and the entry of memory.stat with the page cache in it that is given back before memory runs out."""
DEVICE_PARTS = ("weights", "gradients", "optimizer")
"""Parts of a plan that stay in memory as long as the run trains."""
REMEDY = "raise the tensor- or pipeline-parallel size, or use machines with more memory"


def memory(context: Context) -> list[Finding]:
    """Check the host's memory for all ranks of this machine, and a GPU's for one rank."""
    config, ranks, on_gpu = on_this_machine(context.run_config), ranks_here(context), has_gpu()
    if not models.is_planned(config.model.path):
        text = f"not compared: what a model of this family needs is not planned, only {', '.join(models.PLANNED)}"
        return [Finding("memory", "skipped", text)]
    host = free_host_memory()
    free = _free_gpu_memory(context.place.local_rank) if on_gpu else host
    inputs = planned_inputs(config, free)
    planned = rank_memory(inputs)
    training = planned.phases["train"]
    learner = sum(training[part] for part in DEVICE_PARTS)
    copies = sum(planned.host.values())
    if config.checkpoint.async_save:
        copies += training["weights"] + training["optimizer"]
    parts = [*(() if on_gpu else DEVICE_PARTS), "copies for reference and checkpoint"]
    need = ranks * (copies if on_gpu else learner + copies)
    found = [judge("host_memory", need, host, f"{', '.join(parts)}; ranks here: {ranks}")]
    if on_gpu:
        found.append(judge("gpu_memory", learner, free, ", ".join(DEVICE_PARTS), planned.peak))
    if config.rollout.engine == "remote":
        server = server_memory(inputs, config.rollout.server)
        need = server.rank.peak - server.rank.phases["serve"]["KV cache"]
        what = f"a rank of a server, TP {server.layout.tensor} x PP {server.layout.pipeline}, on such a machine"
        found.append(judge("server_memory", need, free, what, server.rank.peak))
    return found


def planned_inputs(config: Config, free: int) -> Inputs:
    """What ``scripts/plan.py`` plans with.

    Args:
        config: without values that are left to the machine.
        free: free bytes of the device that computes.
    """
    lengths = float(config.data.max_prompt_tokens), float(config.rollout.max_new_tokens)
    gpu = replace(hardware.find("h100"), memory_bytes=free)  # its other figures decide times only
    question = Question(models.read(config.model.path), gpu, *lengths, dataset_prompts=None)
    return plan_inputs(config, question)


def ranks_here(context: Context) -> int:
    """Number of ranks on this machine: those that were started, or those that the configuration asks for."""
    place = context.place
    return place.local_world_size if place.world_size > 1 else context.run_config.trainer.devices


def _free_gpu_memory(number: int) -> int:
    import torch

    return torch.cuda.mem_get_info(number)[0]


def judge(name: str, need: float, free: int, what: str, peak: float | None = None) -> Finding:
    """Compare bytes. Args: need: a lower bound. peak: the planned one with activations and caches; None: not known."""
    text = f"{readable(free)} free, at least {readable(need)} needed ({what})"
    if peak is not None:
        text += f", {readable(peak)} reckoned with activations and caches (scripts/plan.py)"
    if need > free:
        return Finding(name, "failure", text, REMEDY)
    if (peak or need / 0.8) > free:
        return Finding(name, "warning", f"{text}: it may run out of memory", REMEDY)
    return Finding(name, "ok", text)


def free_host_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Free bytes of the machine or, if that is less, of the container or job that this process is in.

    A container may see its own group as the root, under which the path that ``own`` names isn't there.
    """
    import psutil

    free = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller in CGROUPS:
            folder, *names = CGROUPS[controller]
            group = root / folder / path.lstrip("/")
            free += [_free_in_group(at, *names) for at in (group, *group.parents)]
    return int(min(free))


def _free_in_group(group: Path, limit: str, usage: str, reclaimable: str) -> float:
    """Bytes; infinite where the group has no limit, or isn't one."""
    try:
        most, used = (int((group / name).read_text()) for name in (limit, usage))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - used + int(statistics[reclaimable])
    except (OSError, ValueError, KeyError):  # "max" is no number
        return math.inf
