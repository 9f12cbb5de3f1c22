"""The ``cluster`` settings: what Slurm would misread is refused, what others must not read is hidden."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.config.schema import Cluster, Config
from nemo_aapo.config.sources import sources_of
from nemo_aapo.errors import ConfigError

HIDDEN = "<hidden>"
WARNED_EARLY_S = 90
"""Slurm warns of a time limit up to a minute early, and only once: a job that is just starting would miss it."""
_ONLY_BATCH: dict[str, Any] = {
    "launcher": "sbatch",
    "account": None,
    "partition": None,
    "qos": None,
    "time": "04:00:00",
    "exclusive": False,
    "dependency": "singleton",
    "chain": 1,
    "max_requeues": 20,
    "fill_jobs": 8,
    "sbatch_args": {},
    "setup": (),
}
_ONLY_SLURM: dict[str, Any] = {
    "cpus_per_task": None,
    "python": None,
    "srun_args": (),
    "env": {},
    "container.image": None,
    "container.mounts": (),
    "container.workdir": None,
}
_ONLY_SERVERS: dict[str, Any] = {"servers.per_node": 1, "servers.nodes_per_server": 1}
"""Settings with the values that say nothing; another one has no effect without a batch job, without Slurm, or without
rollout servers beside the trainer."""
_OWN_FLAGS = {
    "account": "cluster.account",
    "array": "cluster.fill_jobs",
    "cpus-per-task": "cluster.cpus_per_task",
    "dependency": "cluster.dependency",
    "exclusive": "cluster.exclusive",
    "gpus-per-node": "cluster.gpus_per_node",
    "job-name": "run.name",
    "nodes": "trainer.num_nodes",
    "ntasks-per-node": "trainer.devices",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "signal": "cluster.signal_s",
    "time": "cluster.time",
}
"""Flags of sbatch that have a setting of their own."""


def without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """A composed tree whose ``cluster.env`` has names only: what may be shown, logged and written to files."""
    cluster = tree.get("cluster")
    if not isinstance(cluster, dict) or not isinstance(cluster.get("env"), dict):
        return tree
    return {**tree, "cluster": {**cluster, "env": dict.fromkeys(cluster["env"], HIDDEN)}}


def time_in_seconds(time: str) -> int:
    """Seconds of HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ConfigError: anything else, above all a bare number, and MM:SS, which looks like HH:MM.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d{1,2})(?::(\d\d))?(?::(\d\d))?|(\d+):(\d\d):(\d\d))", time)
    if match is None:
        raise ConfigError(
            f"cluster.time={time}: write HH:MM:SS or D-HH:MM:SS; in a file in quotes, as YAML reads a bare 4:00:00 as "
            "the number 14400"
        )
    parts = [int(part or 0) for part in match.groups()]
    days, hours, minutes, seconds = parts[:4] if match[1] is not None else [0, *parts[4:]]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_typed(cluster: Cluster, overrides: Sequence[str]) -> None:
    """Refuse what was typed and has no effect where the ranks are started.

    What a site's own ``conf/`` says of jobs is not refused: it is there for those who start some.

    Args:
        overrides: ``KEY=VALUE`` words that ``cluster`` was composed of.

    Raises:
        ConfigError: names the key.
    """
    if cluster.kind == "local":
        without_effect, where = _ONLY_BATCH | _ONLY_SLURM | _ONLY_SERVERS, "on this machine (cluster=slurm asks Slurm)"
    elif cluster.kind == "interactive":
        without_effect, where = _ONLY_BATCH | _ONLY_SERVERS, "in an allocation that is there already"
    else:
        without_effect, where = {} if cluster.servers.nodes else _ONLY_SERVERS, "without cluster.servers.nodes"
    typed = [word.partition("=")[0].lstrip("+~") + "." for word in overrides]
    for name, default in without_effect.items():
        key = f"cluster.{name}."
        is_typed = any(word.startswith(key) or (key.startswith(word) and word != "cluster.") for word in typed)
        if is_typed and operator.attrgetter(name)(cluster) != default:
            raise ConfigError(f"cluster.{name} has no effect {where}. Leave it out")


def check_cluster(config: Config) -> None:
    """Refuse what Slurm would misread or what can't go together.

    Raises:
        ConfigError: names the key, its value and the reason.
    """
    cluster = config.cluster
    limit = time_in_seconds(cluster.time)
    if cluster.kind != "slurm" and cluster.servers.nodes:
        raise ConfigError(
            f"cluster.servers.nodes={cluster.servers.nodes} has no effect with cluster.kind={cluster.kind}: servers "
            "beside the trainer are part of a batch job (cluster=slurm_servers). Set it to 0"
        )
    if cluster.kind == "local":
        return
    if cluster.kind == "slurm" and cluster.signal_s + WARNED_EARLY_S > limit:
        raise ConfigError(
            f"cluster.signal_s={cluster.signal_s}: the warning could come before the job is up, as Slurm may send it a "
            f"minute early: cluster.time={cluster.time} must be at least {WARNED_EARLY_S} s longer"
        )
    for key, text in (("run.name", config.run.name), ("run.dir", config.run.dir), *_texts(cluster)):
        if re.search(r"[\x00-\x1f\x7f]", text):
            raise ConfigError(f"{key}={text!r}: line breaks and control characters can't stand in a batch script")
    if "\\" in str(Path(config.run.dir).absolute()):
        raise ConfigError(
            f"run.dir={config.run.dir}: Slurm takes the backslashes out of the names of logs. Use another"
        )
    _check_maps(cluster)
    if cluster.container.image is None and (cluster.container.mounts or cluster.container.workdir):
        raise ConfigError("cluster.container.mounts and workdir have no effect without cluster.container.image")
    if cluster.container.image is not None:
        for key, path in (
            ("run.dir", config.run.dir),
            ("model.path", config.model.path),
            *((f"data.{what}", path) for what in ("train", "validation") for path in _files(config, what)),
        ):
            if not path.startswith("/"):
                raise ConfigError(f"{key}={path}: with cluster.container.image paths must be absolute")
    if cluster.servers.nodes and config.rollout.refit == "ipc":
        raise ConfigError(
            f"rollout.refit=ipc with cluster.servers.nodes={cluster.servers.nodes}: servers on nodes of their own "
            "can't read the trainer's memory. Start them on its node by scripts/serve.py, or take another refit"
        )
    _check_servers(config)
    if cluster.launcher == "nemo_run" and cluster.servers.nodes:
        raise ConfigError("cluster.launcher=nemo_run submits trainers, without servers: set cluster.servers.nodes=0")


def _check_servers(config: Config) -> None:
    """Servers fill their nodes, and each rank has a GPU of its own where GPUs are asked for."""
    servers, server = config.cluster.servers, config.rollout.server
    if not servers.nodes:
        return
    ranks, spanned = server.ranks, servers.nodes_per_server
    if spanned > 1 and (servers.per_node > 1 or servers.nodes % spanned or ranks % spanned):
        raise ConfigError(
            f"cluster.servers.nodes_per_server={spanned}: the {ranks} ranks of a server (rollout.server."
            f"tensor_parallel_size x pipeline_parallel_size) and cluster.servers.nodes={servers.nodes} must be "
            f"divisible by it, and cluster.servers.per_node={servers.per_node} must be 1"
        )
    needed = servers.per_node * ranks // spanned
    if servers.gpus_per_node and needed > servers.gpus_per_node:
        raise ConfigError(
            f"cluster.servers.per_node={servers.per_node} servers of rollout.server.tensor_parallel_size="
            f"{server.tensor_parallel_size} x pipeline_parallel_size={server.pipeline_parallel_size} = {ranks} ranks "
            f"need {needed} GPUs on a node, and cluster.servers.gpus_per_node={servers.gpus_per_node}: lower one of "
            "them, or spread a server over nodes (cluster.servers.nodes_per_server)"
        )


def _files(config: Config, what: Literal["train", "validation"]) -> list[str]:
    """Paths of data; names on the hub, which look like relative ones, aside."""
    return [s.path for s in sources_of(config.data, what) if s.task is None and not s.on_hub]


def _check_maps(cluster: Cluster) -> None:
    for name in cluster.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise ConfigError(f"cluster.env: {name!r} is no name of a variable")
    for flag in cluster.sbatch_args:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", str(flag)):
            raise ConfigError(f"cluster.sbatch_args: {flag!r}: write sbatch's long flags without dashes: constraint")
        if flag in _OWN_FLAGS:
            raise ConfigError(f"cluster.sbatch_args.{flag}: set {_OWN_FLAGS[flag]} instead")


def _texts(cluster: Cluster) -> list[tuple[str, str]]:
    """Everything else that ends up in the script, but for lines of ``setup``."""
    found = [(f"cluster.{key}", getattr(cluster, key) or "") for key in ("account", "partition", "qos", "dependency")]
    found += [(f"cluster.sbatch_args.{flag}", str(value)) for flag, value in cluster.sbatch_args.items()]
    found += [("cluster.srun_args", flag) for flag in cluster.srun_args]
    found += [("cluster.container", text) for text in (cluster.container.image or "", *cluster.container.mounts)]
    return found
