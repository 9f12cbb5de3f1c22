"""Checks Slurm's commands and the ports that a run listens on."""

from __future__ import annotations

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.errors import SlurmError
from nemo_aapo.launch.slurm.commands import slurm

QUESTIONS = {
    "sbatch": ("sbatch", "--version"),
    "srun": ("srun", "--version"),
    "squeue": ("squeue", "--noheader", "--me"),
    "scontrol": ("scontrol", "ping"),
    "sacct": ("sacct", "--noheader", "--allocations"),
}
"""Command -> its arguments in this check; all but the first two ask the controller or the accounting."""
NEEDED = ("sbatch", "srun", "squeue", "scontrol")
"""Without one of these no job can run. sacct only knows jobs that the controller has forgotten, and many clusters have
no accounting."""
ANSWER_S = 15.0
"""A command that takes longer counts as one that does not answer."""


def slurm_tools(context: Context) -> Finding:
    """Check that Slurm's commands are installed and answer."""
    name, config = "slurm", context.config
    wanted = "" if config is None or config.cluster.kind == "local" else config.cluster.kind
    if not any(shutil.which(tool) for tool in QUESTIONS):
        if wanted:
            remedy = "run this on a login node, or use cluster=local"
            return Finding(name, "failure", f"no command of Slurm here, but cluster.kind={wanted}", remedy)
        return Finding(name, "ok", "no command of Slurm here; cluster=local needs none")
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        wrong = dict(zip(QUESTIONS, pool.map(_ask, QUESTIONS.values()), strict=True))
    wrong = {tool: what for tool, what in wrong.items() if what}
    if not wrong:
        return Finding(name, "ok", f"{', '.join(QUESTIONS)} answer")
    same = {what: [tool for tool in wrong if wrong[tool] == what] for what in dict.fromkeys(wrong.values())}
    text = "; ".join(f"{', '.join(tools)}: {what}" for what, tools in same.items())
    failed = bool(wanted) and any(tool in NEEDED for tool in wrong)
    remedy = "ask those who run the cluster"
    if set(wrong) == {"sacct"}:
        remedy = "none is needed: without accounting only the end of jobs that Slurm has forgotten stays unknown"
    return Finding(name, "failure" if failed else "warning", text, remedy)


def _ask(words: tuple[str, ...]) -> str:
    """What is wrong with a command; empty if it answers."""
    try:
        slurm(*words, timeout_s=ANSWER_S)
    except SlurmError as error:
        last = str(error).splitlines()[-1]  # the reason; the lines before it are about the attempts
        return last.removeprefix(f"{words[0]}: ")
    return ""


def ports(context: Context) -> Finding:
    """Check that the configured ports can be listened on; others are picked when they are needed."""
    name, config = "ports", context.config
    wanted: dict[str, tuple[str, int]] = {}
    meeting = ""
    if context.place.world_size > 1:
        meeting = f"the ranks meet at MASTER_PORT={os.environ['MASTER_PORT']}; "
    elif "MASTER_PORT" in os.environ:
        wanted["MASTER_PORT"] = ("", int(os.environ["MASTER_PORT"]))
    if config is not None and config.rollout.server.port:
        wanted["rollout.server.port"] = (config.rollout.server.host, config.rollout.server.port)
    problems = [f"{key}={port}: {reason}" for key, (host, port) in wanted.items() if (reason := _taken(host, port))]
    if problems:
        remedy = "name other ones; `ss -ltnp` says who listens"
        return Finding(name, "failure", "; ".join(problems), remedy)
    if reason := _taken("127.0.0.1", 0):
        return Finding(name, "failure", f"no port of the loopback interface can be had: {reason}", "look at `ss -s`")
    named = ", ".join(f"{key}={port}" for key, (_, port) in wanted.items())
    free = f"{named} free" if named else "free ones can be had, no further one is named"
    return Finding(name, "ok", meeting + free)


def _taken(host: str, port: int) -> str:
    """Why a server could not listen there; empty if it could."""
    try:
        with socket.create_server((host, port)):
            return ""
    except OSError as error:
        # socket adds the address, which the finding names anyway
        return (error.strerror or str(error)).partition(" (while")[0]
