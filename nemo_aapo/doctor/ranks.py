"""Runs the checks on all ranks of a job, one after the other, whatever hangs or dies.

Rank 0 announces the next check, waits for the others' findings under a deadline, and goes on without those that do not
answer. They communicate by torch's TCPStore: nothing that is checked itself (gloo, NCCL) carries the findings.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from nemo_aapo.config import Config
from nemo_aapo.doctor.finding import Check, Context, Finding, Place
from nemo_aapo.doctor.guard import run_guarded
from nemo_aapo.doctor.report import merge
from nemo_aapo.errors import RunError, first_line
from nemo_aapo.launch.local import free_port
from nemo_aapo.launch.slurm.commands import node_addresses
from nemo_aapo.launch.slurm.rank import ADDRESSES, rank_environment

if TYPE_CHECKING:
    from torch.distributed import Store

START_S = 180.0
"""Rank 0 waits so long for the others: Python and torch may come from a cold network disk."""
GRACE_S = 30.0
"""A rank's findings may arrive so long after its check's deadline."""
LEAVE_S = 5.0
"""At the end rank 0 waits so long for the others to leave the store, which ends with it."""


class Listener(Protocol):
    """Is informed of checks and findings as they come; on rank 0."""

    def begin(self, check: Check) -> None:
        """The check runs now."""

    def report(self, finding: Finding) -> None:
        """The running check has this finding."""


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables where plain ``srun`` started several ranks; nothing elsewhere.

    Raises:
        SlurmError: scontrol does not know the nodes' addresses.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    nodes = {"SLURM_JOB_NODELIST": environment["SLURM_STEP_NODELIST"]}
    step = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    addresses = [environment["MASTER_ADDR"]] if "MASTER_ADDR" in environment else node_addresses(nodes, None)
    known = {ADDRESSES.format(role="TRAIN"): ",".join(addresses), "MASTER_PORT": str(15000 + step % 15000)}
    return rank_environment({**known, **environment}, "train")


def place_of(environment: Mapping[str, str]) -> Place:
    """The place of this process by torchrun's variables; without them it is alone."""
    number = {
        name: int(environment.get(name.upper(), default))
        for name, default in (("rank", 0), ("world_size", 1), ("local_rank", 0), ("local_world_size", 1))
    }
    return Place(**number, host=socket.gethostname())


def examine(
    checks: Sequence[Check], config: Config | None, place: Place, listener: Listener, start_s: float = START_S
) -> None:
    """Run all checks, on all ranks of the job.

    Args:
        config: the run's; None: checks that need one are skipped.
        listener: used on rank 0 only.
        start_s: how long rank 0 waits for the others to come.

    Raises:
        RunError: on other ranks than 0: rank 0 is gone.
    """
    if place.world_size == 1:
        failed: set[str] = set()
        for check in checks:
            listener.begin(check)
            for finding in _skipped(check, config, failed) or run_guarded(check, _context(config, place, _go())):
                failed |= _failed(finding)
                listener.report(finding)
    elif place.rank == 0:
        _lead(checks, config, place, listener, start_s)
    else:
        _follow(checks, config, place, start_s)


def _lead(checks: Sequence[Check], config: Config | None, place: Place, listener: Listener, start_s: float) -> None:
    try:
        store = _store(place, start_s)
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        remedy = "set another MASTER_PORT, or MASTER_ADDR to an address of rank 0's machine"
        listener.report(Finding("ranks", "failure", f"rank 0 can't listen on {where}: {first_line(error)}", remedy))
        return
    others = range(1, place.world_size)
    came = _gather(store, "host", others, start_s)
    hosts = {0: place.host, **{rank: came.get(rank, "a machine unknown") for rank in others}}
    lost: set[int] = set(others) - set(came)
    failed: set[str] = set()
    listener.report(_who(hosts, lost, start_s))
    for number, check in enumerate(checks):
        skipped = _skipped(check, config, failed)
        if check.together and lost and not skipped:
            skipped = [Finding(check.name, "skipped", f"needs all ranks, and {_named(lost, hosts)} did not answer")]
        if skipped:
            store.set(f"go/{number}", json.dumps(None))
            listener.report(skipped[0])
            continue
        go = _go()
        store.set(f"go/{number}", json.dumps(go))
        listener.begin(check)
        asked = set(others) - lost
        found = {0: run_guarded(check, _context(config, place, go)), **_answers(store, number, check, asked)}
        lost |= asked - set(found)
        for rank in asked - set(found):
            text = f"no answer within {check.deadline_s + GRACE_S:g} s"
            remedy = "look at what that rank wrote, and whether its machine is there"
            found[rank] = [Finding(check.name, "failure", text, remedy)]
        for finding in merge(found, hosts):
            failed |= _failed(finding)
            listener.report(finding)
    _gather(store, "left", sorted(set(others) - lost), LEAVE_S)  # the store ends with this process


def _answers(store: Store, number: int, check: Check, ranks: set[int]) -> dict[int, list[Finding]]:
    """Rank -> its findings, of the other ranks that answer in time."""
    answers = _gather(store, f"found/{number}", sorted(ranks), check.deadline_s + GRACE_S)
    return {rank: [Finding(**entry) for entry in answer] for rank, answer in answers.items()}


def _follow(checks: Sequence[Check], config: Config | None, place: Place, start_s: float) -> None:
    patience = start_s + max(check.deadline_s for check in checks) + 2 * GRACE_S
    try:
        store = _store(place, start_s)
        store.set(f"host/{place.rank}", json.dumps(place.host))
        for number, check in enumerate(checks):
            store.wait([f"go/{number}"], timedelta(seconds=patience))
            go = json.loads(store.get(f"go/{number}"))
            if go is None:
                continue
            found = run_guarded(check, _context(config, place, go)) if check.concerns(place) else []
            store.set(f"found/{number}/{place.rank}", json.dumps([asdict(finding) for finding in found]))
        store.set(f"left/{place.rank}", "0")
    except RuntimeError as error:
        raise RunError(f"on {place.host}: rank 0 is gone or does not answer ({first_line(error)})") from error


def _store(place: Place, timeout_s: float) -> Store:
    """The store that the ranks share: torchrun's own, else one that rank 0 serves at ``MASTER_PORT``."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the report says enough of waits that time out
    from torch.distributed import PrefixStore, TCPStore

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=place.rank == 0 and not served,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _gather(store: Store, key: str, ranks: Iterable[int], timeout_s: float) -> dict[int, Any]:
    """Rank -> what it has put under ``key``, of the ranks that did so in time."""
    end = time.monotonic() + timeout_s
    found: dict[int, Any] = {}
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
        except RuntimeError:  # DistStoreError; which subclass it is depends on the version of torch
            continue
        found[rank] = json.loads(store.get(f"{key}/{rank}"))
    return found


class _Go(TypedDict):
    """Rank 0's order to start a check: the part of its ``Context`` that all ranks share."""

    port: int
    token: str


def _go() -> _Go:
    return {"port": free_port(), "token": uuid.uuid4().hex}


def _context(config: Config | None, place: Place, go: _Go) -> Context:
    return Context(config, place, **go)


def _skipped(check: Check, config: Config | None, failed: set[str]) -> list[Finding]:
    """The finding that says why a check is skipped; empty if it is run."""
    if config is None and check.needs_config:
        return [Finding(check.name, "skipped", "needs a configuration: pass KEY=VALUE as to train.py")]
    if missing := [name for name in check.after if name in failed]:
        return [Finding(check.name, "skipped", f"builds on {', '.join(missing)}, which failed")]
    return []


def _failed(finding: Finding) -> set[str]:
    return {finding.name} if finding.level == "failure" else set()


def _who(hosts: Mapping[int, str], lost: set[int], start_s: float) -> Finding:
    machines = sorted({host for rank, host in hosts.items() if rank not in lost})
    if not lost:
        return Finding("ranks", "ok", f"{len(hosts)} ranks on {', '.join(machines)}")
    text = f"rank {', '.join(map(str, sorted(lost)))} of {len(hosts)} did not come within {start_s:g} s"
    there = f"there are {len(hosts) - len(lost)}, on {', '.join(machines)}"
    return Finding("ranks", "failure", f"{text}; {there}", "see what the missing rank wrote; can it reach MASTER_ADDR?")


def _named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in sorted(ranks))
