"""Settings of the machines: where the launcher starts ranks, and what it asks Slurm for."""

from __future__ import annotations

from typing import Any, Literal

from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import NODES, RANKS_OF_NODE, SECONDS


@section
class Servers:
    """Rollout servers beside the trainer."""

    nodes: int = setting("nodes with rollout servers; 0: none", decides=False, minimum=0, sane=NODES)
    per_node: int = setting(
        "servers on each of these nodes; they share its GPUs, one for each rank of a server",
        decides=False,
        minimum=1,
        sane=RANKS_OF_NODE,
    )
    nodes_per_server: int = setting(
        "nodes that the ranks of one server are spread over; above 1 with per_node=1",
        decides=False,
        minimum=1,
        sane=NODES,
    )
    gpus_per_node: int = setting("GPUs asked for on each of these nodes", decides=False, minimum=0, sane=RANKS_OF_NODE)

    @property
    def count(self) -> int:
        """Number of servers."""
        return self.nodes * self.per_node // self.nodes_per_server


@section
class Container:
    """What pyxis starts the ranks in."""

    image: str | None = setting(
        "image that pyxis starts, e.g. /images/nemo_aapo.sqsh or registry#name:tag", decides=False, path=True
    )
    mounts: tuple[str, ...] = setting(
        "what the container sees: source:target[:flags]; run.dir is always mounted, at its own place",
        decides=False,
        path=True,
    )
    workdir: str | None = setting(
        "the checkout inside the container; null: the image's own working directory", decides=False
    )


@section
class Cluster:
    """Where the launcher starts ranks, and what it asks Slurm for."""

    kind: Literal["local", "slurm", "interactive"] = setting(
        "local: on this machine | slurm: a batch job | interactive: inside an allocation (salloc)", decides=False
    )
    launcher: Literal["sbatch", "nemo_run"] = setting(
        "what submits: sbatch | nemo_run (the package nemo-run, requirements/nemo_run.txt)", decides=False
    )
    account: str | None = setting("Slurm's --account", decides=False)
    partition: str | None = setting("Slurm's --partition", decides=False)
    qos: str | None = setting("Slurm's --qos", decides=False)
    time: str = setting(
        "limit of one job, HH:MM:SS or D-HH:MM:SS; in a file in quotes: YAML reads a bare 4:00:00 as 14400",
        decides=False,
    )
    gpus_per_node: int = setting("GPUs asked for on each node; 0: none", decides=False, minimum=0, sane=RANKS_OF_NODE)
    cpus_per_task: int | None = setting("cores of each rank", decides=False, minimum=1, sane=100_000)
    exclusive: bool = setting("ask for whole nodes", decides=False)
    dependency: str | None = setting(
        "singleton: jobs of this run never run at once | e.g. afterok:123 | null", decides=False
    )
    chain: int = setting(
        "submit so many jobs; each goes on where the one before ended", decides=False, minimum=1, sane=1000
    )
    signal_s: int = setting(
        "so many seconds before the time limit: finish the step, save, requeue; after a stop servers get half of it",
        decides=False,
        minimum=1,
        sane=SECONDS,
    )
    max_requeues: int = setting(
        "a run may be requeued so often in a row without a new checkpoint", decides=False, minimum=0, sane=1_000_000
    )
    fill_jobs: int = setting(
        "scripts/launch.py fill: the reference store is filled by so many array tasks",
        decides=False,
        minimum=1,
        sane=100_000,
    )
    servers: Servers
    container: Container
    python: str | None = setting(
        "Python of the ranks; null: the launcher's, in a container `python`", decides=False, path=True
    )
    sbatch_args: dict[str, Any] = setting("any other flag of sbatch: {constraint: h100, mail-type: END}", decides=False)
    srun_args: tuple[str, ...] = setting("any other flags of srun: [--cpu-bind=none]", decides=False)
    env: dict[str, Any] = setting(
        "variables of the job, secrets too: kept in a file that only its owner may read", decides=False
    )
    setup: tuple[str, ...] = setting('lines of bash before the ranks start: ["module load cuda"]', decides=False)
