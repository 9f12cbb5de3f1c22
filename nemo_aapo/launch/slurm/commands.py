"""Slurm's own commands: what they say becomes a value, or an error in Slurm's words."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_aapo.errors import NoAnswerError, SlurmError

TIMEOUT_S = 60.0
"""Slurm's controller may be slow; it is never waited for longer."""
_OF_A_JOB = re.compile(
    r"SLURM_(?!CONF$)|SLURM(D|STEPD)_|PMI_|PMIX_|OMPI_"
    r"|(RANK|(LOCAL|GROUP)_RANK|(LOCAL_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT))$"
)
"""Variables by which Slurm, MPI and torchrun tell a process which job it belongs to, and what it has there."""
_UNANSWERED = re.compile(
    r"unable to contact slurm controller|standby mode|rate limit exceeded|connection (failure|refused|reset|timed out)"
    r"|socket timed out|message (send|receive) failure|zero bytes were transmitted|unexpected message received",
    re.IGNORECASE,
)
"""Of the texts in Slurm's ``src/common/slurm_errno.c`` and of the system's those that say that no answer came, or that
the controller is changing places with its backup or wants to be asked later; the last is what ``scontrol requeue`` says
then. All others are answers."""
QUEUED = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
"""States of a job that runs, or may yet run."""


@dataclass(frozen=True)
class JobState:
    """What Slurm knows of a job now."""

    id: str
    state: str
    """RUNNING, PENDING, COMPLETED, ...; UNKNOWN: Slurm has forgotten it."""
    where: str = ""
    """The nodes, or why it waits."""
    time_left: str = ""
    """Until its time limit, as squeue writes it."""
    source: str = ""
    """The command that knew it."""

    @property
    def is_over(self) -> bool:
        """It neither runs nor waits."""
        return self.state not in QUEUED


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment to submit jobs from, also where this process is part of one itself.

    A job would take over what is left of another's: ``SLURM_MEM_PER_CPU`` of a ``salloc --mem-per-cpu`` ends each
    ``srun`` of a job with memory by nodes. What the user tells sbatch (``SBATCH_*``) and where Slurm is stay.
    """
    return {name: value for name, value in environment.items() if not _OF_A_JOB.match(name)}


def slurm(*words: str, timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints.

    Args:
        environment: the command's; None: this process's.

    Raises:
        NoAnswerError: Slurm did not answer it, or not in time.
        SlurmError: it failed, or does not exist here.
    """
    if shutil.which(words[0]) is None:
        raise SlurmError(f"there is no `{words[0]}` here: call this on a login node of a Slurm cluster")
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, env=environment
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"`{words[0]}` did not answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"`{words[0]}` failed: {done.returncode}"
        raise (NoAnswerError if _UNANSWERED.search(said) else SlurmError)(said)
    return done.stdout


def job_states(ids: Sequence[str]) -> list[JobState]:
    """The state of each job: by squeue, else scontrol, else sacct; not every cluster has all of them."""
    if not ids:
        return []
    queued = parse_squeue(slurm("squeue", "--noheader", "--me", "--format=%F|%T|%R|%L"))
    return [queued.get(job) or _from_scontrol(job) or _from_sacct(job) or JobState(job, "UNKNOWN") for job in ids]


def parse_squeue(text: str) -> dict[str, JobState]:
    """Lines of ``%F|%T|%R|%L`` by job; of an array or a het job the first line that runs, else the first."""
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        job, state, where, left = line.split("|", 3)
        if job not in found or (state == "RUNNING" and found[job].state != "RUNNING"):
            found[job] = JobState(job, state, where, left if state == "RUNNING" else "", "squeue")
    return found


def parse_scontrol(text: str) -> dict[str, str]:
    """The fields of the first line of ``scontrol show ... -o``; values without spaces only."""
    first = text.splitlines()[0] if text else ""
    return dict(re.findall(r"(?:^|\s)([\w/:]+)=(\S*)", first))


def parse_sacct(job: str, text: str) -> JobState | None:
    """The first line of ``sacct --parsable2 --format=State,NodeList``."""
    if not text.strip():
        return None
    state, nodes = text.splitlines()[0].split("|")
    return JobState(job, state.split()[0], nodes, "", "sacct")  # "CANCELLED by 1000"


def _from_scontrol(job: str) -> JobState | None:
    try:
        fields = parse_scontrol(slurm("scontrol", "show", "job", "-o", job))
    except SlurmError:  # it forgets jobs after MinJobAge
        return None
    return JobState(job, fields["JobState"], fields.get("NodeList", ""), "", "scontrol")


def _from_sacct(job: str) -> JobState | None:
    words = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,NodeList", f"--jobs={job}")
    try:
        return parse_sacct(job, slurm(*words))
    except SlurmError:  # no accounting on this cluster
        return None


def node_addresses(environment: Mapping[str, str], group: int | None) -> list[str]:
    """Addresses of the nodes of a job, or of one group of a het job, in Slurm's order.

    Host names need not resolve on every cluster; what the nodes are configured with does.
    """
    key = "SLURM_JOB_NODELIST" if group is None else f"SLURM_JOB_NODELIST_HET_GROUP_{group}"
    names = slurm("scontrol", "show", "hostnames", environment[key]).split()
    lines = slurm("scontrol", "show", "node", "-o", environment[key]).splitlines()
    by_name = {fields["NodeName"]: fields.get("NodeAddr", "") for fields in map(parse_scontrol, lines)}
    return [by_name.get(name) or name for name in names]
