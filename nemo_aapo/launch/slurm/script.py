"""The batch script of a run, as text: a pure function of the configuration and of where things are.

The script says what runs and with which flags; what happens when something ends is decided in ``supervisor``, which
the script becomes (``exec``), so that Slurm's signals to the batch shell reach it directly.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.config.command_line import config_directory
from nemo_aapo.launch.slurm.paths import FROZEN, RunPaths

SERVERS = "servers"
"""The role of rollout servers; all others have the name of what they do."""
SEPARATOR = "::"
"""Begins the command of a role on the supervisor's command line."""
COMMANDS = ("-m", "nemo_aapo.cli")
"""What Python is called with; the name of a command comes next."""


@dataclass(frozen=True)
class Site:
    """Where the launcher was called."""

    python: str
    """Its interpreter; the supervisor runs under it, on the first node of the job."""
    checkout: Path | None
    """The directory that holds ``nemo_aapo/`` and ``conf/``; None: the package is installed, and Python finds it."""
    directory: Path
    """The working directory, which relative paths of the configuration refer to."""

    @classmethod
    def here(cls) -> Site:
        """This process's."""
        package = Path(__file__).resolve().parents[2]
        installed = config_directory().is_relative_to(package)
        return cls(sys.executable, None if installed else package.parent, Path.cwd())

    def launcher(self, action: str, directory: Path) -> str:
        """What a person types for an action on a run or a folder of runs, to be pasted into a shell."""
        command = ["nemo-aapo", "launch"] if self.checkout is None else ["python", "scripts/launch.py"]
        return shlex.join([*command, action, str(directory)])


@dataclass(frozen=True)
class Role:
    """Processes that do the same."""

    name: str
    nodes: int
    per_node: int
    gpus_per_node: int
    words: tuple[str, ...]
    """What Python is called with."""
    log: str
    """Name of the log, with Slurm's placeholders."""
    servers: int = 0
    """Each server is a step of its own, with its part of these nodes. 0: all tasks are one step."""
    nodes_per_server: int = 1


def render_training(config: Config, site: Site) -> str:
    """The script that trains, with rollout servers beside the trainer if the configuration asks for them."""
    return _render_job(config, site, training_roles(config, site))


def _render_job(config: Config, site: Site, roles: Sequence[Role]) -> str:
    """The script of a job with a history, which requeues itself; the first of its roles decides when it ends."""
    blocks = [batch_header(config, site)]
    for role in roles[1:]:
        flags = _flags(config, site, role, job_name(config, role.name, len(roles)))
        blocks.append(flags | {"dependency": config.cluster.dependency})
    mode = ["job", f"--max-requeues={config.cluster.max_requeues}"]
    return _script(config, site, blocks, supervisor_words(config, site, roles, mode))


def batch_header(config: Config, site: Site) -> dict[str, Any]:
    """sbatch's flags of a training, or of the trainer's part of it, as ``directives`` takes them."""
    trainer, *others = training_roles(config, site)
    flags = _flags(config, site, trainer, job_name(config, trainer.name, 1 + len(others)))
    return flags | {"signal": f"B:USR1@{config.cluster.signal_s}", "dependency": config.cluster.dependency}


def render_fill(config: Config, site: Site) -> str:
    """The script of the array that fills the reference store, each task a share of the prompts."""
    words = (*COMMANDS, "fill", "--shard", "{task}", "--shards", "{tasks}")
    role = replace(_trainer_role(config, (*words, *frozen_config_file(config, site))), log="fill_%a_rank_%t")
    block = _flags(config, site, role, job_name(config, "fill", 1))
    block |= {"array": f"0-{config.cluster.fill_jobs - 1}", "output": _log(config, site, "fill_%A_%a")}
    return _script(config, site, [block], supervisor_words(config, site, [role], ["task"]))


def render_evaluation(config: Config, site: Site) -> str:
    """The script that evaluates, by what an evaluation shares with training; with rollout servers likewise."""
    role = _trainer_role(config, (*COMMANDS, "evaluate", *frozen_config_file(config, site)))
    return _render_job(config, site, [role, *_server_role(config, frozen_config_file(config, site, SERVERS))])


def render_merge(config: Config, site: Site, after: str) -> str:
    """The script of the job that joins what the array ``after`` has drawn."""
    words = (*COMMANDS, "fill", "--merge", *frozen_config_file(config, site))
    role = Role("train", 1, 1, 0, words, "merge")
    block = _flags(config, site, role, job_name(config, "merge", 1))
    # without the second flag the job would wait for ever once a task of the array has failed
    block |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return _script(config, site, [block], supervisor_words(config, site, [role], ["task"]))


def training_roles(config: Config, site: Site) -> list[Role]:
    """The trainer first: its first node runs the script."""
    config_file = frozen_config_file(config, site)
    return [_trainer_role(config, (*COMMANDS, "train", *config_file)), *_server_role(config, config_file)]


def _server_role(config: Config, config_file: Sequence[str]) -> list[Role]:
    """The rollout servers, where there are to be some."""
    servers = config.cluster.servers
    if not servers.nodes:
        return []
    words = (*COMMANDS, "serve", *config_file, "rollout.server.index={server}", "rollout.server.host={address}")
    spanned = servers.nodes_per_server
    tasks = servers.per_node * config.rollout.server.ranks // spanned
    return [Role(SERVERS, servers.nodes, tasks, servers.gpus_per_node, words, "", servers.count, spanned)]


def supervisor_words(config: Config, site: Site, roles: Sequence[Role], mode: Sequence[str]) -> list[str]:
    """The call of the supervisor, with the ``srun`` of every role."""
    words = [site.python, "-u", "-m", "nemo_aapo.launch.slurm.supervisor", *mode]
    words.append(f"--fault-timeout={config.trainer.fault_timeout_s:g}")
    for role in roles[1:]:
        words += [f"--servers={role.servers}", f"--min-servers={config.rollout.remote.min_servers}"]
    words.append(str(paths_of(config, site).run_dir))
    for number, role in enumerate(roles):
        group = [f"--het-group={number}"] if len(roles) > 1 else []
        words += [SEPARATOR, role.name, "srun", *group, *_srun_flags(config, site, role), "--"]
        words += rank_words(config, site, role)
    return words


def split_roles(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Options, and role -> command, of ``OPTIONS :: ROLE COMMAND ... :: ROLE COMMAND ...``."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], {role: command for role, *command in parts[1:]}


def rank_words(config: Config, site: Site, role: Role) -> list[str]:
    """What ``srun`` starts on every node."""
    python = config.cluster.python or ("python" if config.cluster.container.image else site.python)
    return [python, "-m", "nemo_aapo.launch.slurm.rank", role.name, *role.words]


def paths_of(config: Config, site: Site) -> RunPaths:
    """The run directory's files; ``run.dir`` is taken from the site's working directory."""
    return RunPaths(site.directory / config.run.dir)


def frozen_config_file(config: Config, site: Site, name: str = FROZEN) -> tuple[str, ...]:
    """The words that make a script read the frozen configuration, or another one beside it."""
    return ("--config-path", str(paths_of(config, site).folder), "--config-name", name)


def _trainer_role(config: Config, words: tuple[str, ...]) -> Role:
    return Role(
        "train", config.trainer.num_nodes, config.trainer.devices, config.cluster.gpus_per_node, words, "rank_%t"
    )


def job_name(config: Config, role: str, roles: int) -> str:
    """Unique per run, as ``singleton`` goes by it; and per role, or the roles of one job would wait for each other."""
    run_dir = str(Path(config.run.dir).absolute())
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', config.run.name)}-{hashlib.sha256(run_dir.encode()).hexdigest()[:8]}"
    return name if roles == 1 and role == "train" else f"{name}-{role}"


def _log(config: Config, site: Site, name: str) -> str:
    """A path as Slurm takes it, where ``%`` begins a placeholder."""
    return str(paths_of(config, site).logs).replace("%", "%%") + f"/{name}.log"


def _flags(config: Config, site: Site, role: Role, job_name: str) -> dict[str, Any]:
    """sbatch's flags for one role, as ``directives`` takes them."""
    cluster = config.cluster
    return {
        "job-name": job_name,
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "time": cluster.time,
        "nodes": role.nodes,
        "ntasks-per-node": role.per_node,
        "gpus-per-node": role.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "exclusive": cluster.exclusive,
        "requeue": True,
        "open-mode": "append",
        "output": _log(config, site, "slurm_%j"),
        "chdir": site.directory,
        **cluster.sbatch_args,
    }


def _srun_flags(config: Config, site: Site, role: Role) -> list[str]:
    cluster, container = config.cluster, config.cluster.container
    nodes = role.nodes_per_server if role.servers else role.nodes
    tasks = role.nodes * role.per_node // (role.servers or 1)  # else srun would take salloc's --ntasks
    flags = [f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={tasks // nodes}", "--kill-on-bad-exit=1"]
    if role.servers:  # steps share what the job has on a node: Slurm would else give all of it to the first one
        flags += ["--relative={node}", "--overlap", "--cpu-bind=none", "--open-mode=append"]
    else:
        if cluster.cpus_per_task is not None:  # since Slurm 22.05 srun does not take it from sbatch
            flags.append(f"--cpus-per-task={cluster.cpus_per_task}")
        flags += ["--open-mode=append", f"--output={_log(config, site, role.log)}"]
    if container.image is not None:
        run_dir = paths_of(config, site).run_dir
        mounts = ",".join([*container.mounts, f"{run_dir}:{run_dir}"])
        flags += [f"--container-image={container.image}", f"--container-mounts={mounts}", "--no-container-mount-home"]
        flags += [f"--container-workdir={container.workdir}"] if container.workdir else []
    return [*flags, *cluster.srun_args]


def _script(config: Config, site: Site, blocks: Sequence[Mapping[str, Any]], command: Sequence[str]) -> str:
    lines = ["#!/bin/bash"]
    for number, block in enumerate(blocks):
        lines += ["#SBATCH hetjob"] if number else []
        lines += directives(block)
    lines += [
        "",
        "set -euo pipefail",
        "trap '' USR1  # a warning of the time limit must not end what has no handler yet",
        *config.cluster.setup,
    ]
    if config.cluster.env:
        lines += ["# shellcheck source=/dev/null", f"source {shlex.quote(str(paths_of(config, site).environment))}"]
    lines += python_path(site)
    return "\n".join([*lines, "", _wrapped(["exec", *command])]) + "\n"


def python_path(site: Site) -> list[str]:
    """The line of bash by which every Python of the job finds the checkout's package; it comes after the user's own."""
    if site.checkout is None:
        return []
    return [f"export PYTHONPATH={shlex.quote(str(site.checkout))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def directives(block: Mapping[str, Any]) -> list[str]:
    """sbatch's flags as lines of a script; True: a flag without a value, None or False: left out."""
    asked = {flag: value for flag, value in block.items() if value is not None and value is not False}
    return [
        f"#SBATCH --{flag}" if value is True else f"#SBATCH --{flag}={_quoted(str(value))}"
        for flag, value in asked.items()
    ]


def _quoted(value: str) -> str:
    """As bash takes it, but that sbatch reads a backslash as an escape inside of quotes, too."""
    return shlex.quote(value).replace("\\", "\\\\")


def _wrapped(words: Sequence[str]) -> str:
    """A long command over several lines, broken before each role and before what ``srun`` starts."""
    lines: list[str] = []
    line = ""
    for word in words:
        if word == SEPARATOR:
            lines, line = [*lines, line], f"    {SEPARATOR}"
        elif word == "--":
            lines, line = [*lines, f"{line} --"], "       "
        else:
            line += f" {shlex.quote(word)}" if line else word
    return " \\\n".join([*lines, line])


def environment_file(variables: Mapping[str, Any]) -> str:
    """``cluster.env`` as lines of bash."""
    return "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in variables.items())
