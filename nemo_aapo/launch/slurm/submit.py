"""Freezes the configuration, writes the script, hands it to Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_aapo.config import Config, parse, without_secrets
from nemo_aapo.errors import ConfigError, SlurmError
from nemo_aapo.launch.slurm import nemo_run
from nemo_aapo.launch.slurm.attempts import read_history, write_history
from nemo_aapo.launch.slurm.commands import job_states, outside_of_jobs, slurm
from nemo_aapo.launch.slurm.paths import RunPaths, add_jobs, is_same, own_jobs, read_jobs
from nemo_aapo.launch.slurm.script import (
    SERVERS,
    Site,
    environment_file,
    paths_of,
    render_evaluation,
    render_fill,
    render_merge,
    render_training,
    supervisor_words,
    training_roles,
)
from nemo_aapo.utils.files import FINISHED, to_json, write_atomic


def check_here(config: Config) -> None:
    """Refuse, before anything is written, a submission that can't be made from this machine.

    Raises:
        ConfigError: no Slurm, no nemo-run, no allocation or one that is too small.
    """
    cluster = config.cluster
    if config.dry_run or cluster.kind == "local":
        return
    if cluster.kind == "interactive":
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError(
                "cluster.kind=interactive: this is no allocation. First: salloc --nodes=N, or cluster=slurm"
            )
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if not cluster.servers.nodes and config.trainer.num_nodes > nodes:
            raise ConfigError(f"trainer.num_nodes={config.trainer.num_nodes}: the allocation has {nodes}")
    elif cluster.launcher == "nemo_run":
        nemo_run.require()
    elif shutil.which("sbatch") is None:
        raise ConfigError("cluster.kind=slurm: there is no `sbatch` here. Submit from a login node of the cluster")


def submit_training(config: Config, tree: dict[str, Any], site: Site) -> int:
    """Submit the run ``cluster.chain`` times, or only print the script (``dry_run``).

    Args:
        tree: the resolved configuration without secrets, as ``config_main`` hands it over.

    Raises:
        ConfigError: Slurm refuses the job, in Slurm's words; or jobs of the run wait with another configuration.
    """
    script = render_training(config, site)
    if config.dry_run:
        print(script, end="")
        return 0
    through_nemo_run = config.cluster.launcher == "nemo_run"
    paths = freeze(config, nemo_run.with_time_limit(config, tree) if through_nemo_run else tree, site)
    write_atomic(paths.script, script)
    write_history(paths.history, read_history(paths.history).submitted_again())  # before a job looks there
    ids = []
    for _ in range(config.cluster.chain):
        ids.append(nemo_run.submit(config, site) if through_nemo_run else sbatch(paths.script))
        add_jobs(paths, [{"id": ids[-1], "what": "train"}], site.directory)
    print(f"submitted {', '.join(ids)}: {paths.script}")
    print(f"how it fares: {site.launcher('status', paths.run_dir)}")
    return 0


def submit_again(paths: RunPaths) -> str:
    """Submit what is frozen in a run directory once more, for the directory as it is called now; the job's id.

    Raises:
        ConfigError: Slurm refuses the job, no training was submitted before, or by an older version.
    """
    trainings = [job for job in read_jobs(paths) if job["what"] == "train"]
    if not trainings or not paths.frozen.exists():
        raise ConfigError(f"{paths.run_dir}: no training was submitted from here. Start it by its launch.py command")
    cwd = Path(trainings[-1].get("cwd", Path.cwd()))
    site = replace(Site.here(), directory=cwd)
    tree = yaml.safe_load(paths.frozen.read_text(encoding="utf-8"))
    if not is_same(cwd / tree["run"]["dir"], paths.run_dir):
        tree = moved(tree, tree["run"]["dir"], str(paths.run_dir))
        paths.make()  # a copy may have lost the rights
        write_atomic(paths.frozen, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    write_atomic(paths.script, render_training(parse(tree), site))
    write_history(paths.history, read_history(paths.history).submitted_again())
    job = sbatch(paths.script)
    add_jobs(paths, [{"id": job, "what": "train"}], cwd)
    return job


def moved(tree: Any, old: str, new: str, key: str = "") -> Any:
    """A resolved tree for another run directory: every path into the old one leads into the new one."""
    if isinstance(tree, dict):
        return {name: moved(value, old, new, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [moved(value, old, new, key) for value in tree]
    inside = isinstance(tree, str) and (tree.startswith(f"{old}/") or (tree == old and key.endswith("dir")))
    return new + tree[len(old) :] if inside else tree


def submit_fill(config: Config, tree: dict[str, Any], site: Site) -> int:
    """Submit the array that fills the reference store, and the job that joins its parts when all is there.

    Raises:
        ConfigError: as ``submit_training``.
    """
    if config.dry_run:
        print(render_fill(config, site), end="")
        print(render_merge(config, site, after="ARRAY"), end="")
        return 0
    paths = freeze(config, tree, site)
    ids = {}
    write_atomic(paths.folder / "fill.sbatch", render_fill(config, site))
    ids["fill"] = sbatch(paths.folder / "fill.sbatch")
    write_atomic(paths.folder / "merge.sbatch", render_merge(config, site, after=ids["fill"]))
    ids["merge"] = sbatch(paths.folder / "merge.sbatch")
    add_jobs(paths, [{"id": job, "what": what} for what, job in ids.items()], site.directory)
    print(f"submitted {ids['fill']} (array of {config.cluster.fill_jobs}), then {ids['merge']}, which joins its parts")
    print(f"train after it: cluster.dependency=afterok:{ids['merge']}")
    return 0


def submit_evaluation(config: Config, tree: dict[str, Any], site: Site) -> int:
    """Submit an evaluation, or only print the script (``dry_run``). At its time limit it keeps all, and is requeued.

    Args:
        config: what it shares with training.
        tree: the evaluation's own resolved configuration.

    Raises:
        ConfigError: as ``submit_training``; or a kind of job that evaluations have not.
    """
    cluster = config.cluster
    if cluster.kind != "slurm" or cluster.launcher != "sbatch" or cluster.chain > 1:
        raise ConfigError(
            "launch.py evaluate starts ranks here (cluster=local), or submits one job that requeues itself "
            "(cluster=slurm, cluster=slurm_servers). It has no chain and no nemo_run"
        )
    script = render_evaluation(config, site)
    if config.dry_run:
        print(script, end="")
        return 0
    paths = freeze(config, tree, site)
    (paths.run_dir / FINISHED).unlink(missing_ok=True)  # the job looks for what is missing by itself
    if cluster.servers.nodes:  # servers read the settings of a training
        tree = without_secrets(json.loads(to_json(asdict(config))))
        write_atomic(paths.folder / f"{SERVERS}.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    write_atomic(paths.script, script)
    write_history(paths.history, read_history(paths.history).submitted_again())
    job = sbatch(paths.script)
    add_jobs(paths, [{"id": job, "what": "evaluate"}], site.directory)
    print(f"submitted {job}: {paths.script}")
    print(f"how it fares: {site.launcher('status', paths.run_dir)}")
    return 0


def run_interactively(config: Config, tree: dict[str, Any], site: Site) -> int:
    """Start the roles on the nodes of the allocation that this process is in. Does not return."""
    roles = training_roles(config, site)
    words = supervisor_words(config, site, roles, ["interactive"])
    if config.dry_run:
        print(shlex.join(words))
        return 0
    freeze(config, tree, site)
    environment = {**os.environ, **{name: str(value) for name, value in config.cluster.env.items()}}
    if site.checkout is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site.checkout), environment.get("PYTHONPATH")]))
    os.execve(words[0], words, environment)


def freeze(config: Config, tree: dict[str, Any], site: Site) -> RunPaths:
    """Write what the job reads: the frozen configuration, the variables, the servers' token.

    Raises:
        ConfigError: jobs of this run still go by another configuration.
    """
    paths = paths_of(config, site)
    tree = tree | {"dry_run": False} if "dry_run" in tree else tree  # an evaluation's has none
    frozen = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if paths.frozen.exists() and paths.frozen.read_text(encoding="utf-8") != frozen:
        active = [state.id for state in job_states([job["id"] for job in own_jobs(paths)]) if not state.is_over]
        if active:
            raise ConfigError(
                f"run.dir={config.run.dir}: job {', '.join(active)} of this run waits or runs with other settings, and "
                "would go on with these: scripts/launch.py cancel first, or give this run another name (run.name=NAME)"
            )
    try:
        paths.make()
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir}: can't be made ({error.strerror})") from None
    if config.cluster.servers.nodes:
        paths.make_token()
    write_atomic(paths.frozen, frozen)
    write_atomic(paths.environment, environment_file(config.cluster.env), mode=0o600)
    return paths


def sbatch(script: Path) -> str:
    """Submit; the job's id.

    Raises:
        ConfigError: Slurm's own words, and what the partitions have, as these often leave open what is wrong.
    """
    try:
        said = slurm("sbatch", "--parsable", str(script), environment=outside_of_jobs(os.environ))
    except SlurmError as error:
        raise ConfigError(f"{error}{_partitions()}\nThe script is {script}") from None
    return said.split(";")[0].strip()


def _partitions() -> str:
    try:
        lines = slurm("sinfo", "--noheader", "--format=%P: %D nodes, %c cores, %m MiB, %G, time limit %l").splitlines()
    except SlurmError:
        return ""
    return "\nPartitions here:\n" + "\n".join(f"  {line}" for line in lines)
