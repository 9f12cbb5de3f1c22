"""Submits the frozen configuration through nemo-run's ``SlurmExecutor`` instead of a script of our own.

The ranks start as they do under our script, but nemo-run's script stands around them: it dies of the warning before a
time limit and requeues after failures only. So the trainer itself stops in time (``checkpoint.max_time_s``), the job
ends well, and the run goes on in the next job of a chain (``cluster.chain``). No history, no ``requeue``.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.config.cluster import time_in_seconds
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.slurm.commands import outside_of_jobs
from nemo_aapo.launch.slurm.script import Role, Site, job_name, paths_of, python_path, rank_words, training_roles
from nemo_aapo.utils.job import STARTED

_REMEDY = "scripts/nemo_run.sh makes an environment that it works in; or leave it to cluster.launcher=sbatch"
_ADDRESSES = (
    "import os; from nemo_aapo.launch.slurm.commands import node_addresses; "
    "print(','.join(node_addresses(os.environ, None)))"
)


def with_time_limit(config: Config, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree to freeze: the trainer stops ``cluster.signal_s`` before the job's time limit."""
    limit = float(time_in_seconds(config.cluster.time) - config.cluster.signal_s)
    given = config.checkpoint.max_time_s
    return {**tree, "checkpoint": {**tree["checkpoint"], "max_time_s": limit if given is None else min(given, limit)}}


def home(config: Config, site: Site) -> Path:
    """Where nemo-run keeps what it made of the run.

    Raises:
        ConfigError: nemo-run 0.11.1 replaces every ``/nemo_run`` in its script by a directory of its own, in paths too.
    """
    found = paths_of(config, site).folder / "nemo-run"
    for path in (found, site.checkout or found, site.directory):
        if "/nemo_run" in str(path):
            raise ConfigError(f"{path}: nemo-run can't have /nemo_run in a path; use another run.dir or directory")
    return found


def require() -> None:
    """Raise ConfigError where nemo-run is not installed."""
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError(f"cluster.launcher=nemo_run: nemo-run can't be imported (not installed). {_REMEDY}")


def submit(config: Config, site: Site) -> str:
    """Submit one job; its id.

    Raises:
        ConfigError: nemo-run is not installed, or does not import; Slurm refuses the job.
    """
    try:
        import nemo_run
        from nemo_run.config import set_nemorun_home
    except ImportError as error:
        raise ConfigError(f"cluster.launcher=nemo_run: nemo-run can't be imported ({error}). {_REMEDY}") from None
    (role,) = training_roles(config, site)
    for name in os.environ.keys() - outside_of_jobs(os.environ).keys():  # its sbatch gets all that is here
        del os.environ[name]
    set_nemorun_home(str(home(config, site)))
    script = nemo_run.Script(inline=shlex.join(["exec", *rank_words(config, site, role)]))
    executor = _executor(nemo_run, config, site, role)
    with nemo_run.Experiment(job_name(config, "train", 1)) as experiment:
        experiment.add(script, executor=executor, name="train")
        try:
            experiment.run(detach=True)
        except Exception as error:
            if (result := getattr(error, "result", None)) is None:
                raise
            raise ConfigError(result.stderr.strip()) from None  # sbatch failed: its words are in a result of `invoke`
        handle = experiment.jobs[0].handle  # scheduler://session/JOB/role/0
    return handle.partition("://")[2].split("/")[1]


def _executor(nemo_run: Any, config: Config, site: Site, role: Role) -> Any:
    from nemo_run.core.execution.slurm import SlurmJobDetails

    cluster, paths = config.cluster, paths_of(config, site)
    logs = str(paths.logs).replace("%", "%%")
    srun = [f"--chdir={site.directory}", "--open-mode=append", f"--output={logs}/rank_%t.log"]
    dependency = {"dependency": cluster.dependency} if cluster.dependency else {}
    environment = shlex.quote(str(paths.environment))
    setup = [
        *cluster.setup,
        f"set +vx; source {environment}; set -vx",  # nemo-run's script shows every line that it executes
        *python_path(site),
        f"export NEMO_AAPO_TRAIN_ADDRESSES=$({shlex.join([site.python, '-c', _ADDRESSES])})",
        f"export {STARTED}=${{SLURM_JOB_START_TIME:-$(date +%s)}}",  # the trainer's time limit counts from there
        f"export MASTER_PORT=$({shlex.quote(site.python)} -m nemo_aapo.launch.slurm.rank port $((SLURM_JOB_ID * 7)))",
    ]
    return nemo_run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        time=cluster.time,
        nodes=role.nodes,
        ntasks_per_node=role.per_node,
        gpus_per_node=role.gpus_per_node or None,
        cpus_per_task=cluster.cpus_per_task,
        exclusive=cluster.exclusive or None,
        container_image=cluster.container.image,
        container_mounts=[*cluster.container.mounts, f"{paths.run_dir}:{paths.run_dir}"],
        additional_parameters={**dependency, **{k.replace("-", "_"): v for k, v in cluster.sbatch_args.items()}},
        srun_args=[*srun, *cluster.srun_args],
        setup_lines="\n".join(setup),
        job_details=SlurmJobDetails(job_name=job_name(config, "train", 1), folder=str(paths.folder)),
        packager=nemo_run.Packager(),
        tunnel=nemo_run.LocalTunnel(job_dir=str(home(config, site) / "experiments")),
        poll_estimated_start_time=False,
    )
