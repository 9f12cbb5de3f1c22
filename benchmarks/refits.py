"""What a rollout server's memory does over many refits: a real server, a real fleet, new weights each time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import Workload, make_input
from nemo_aapo.errors import RunError

MIB = 2**20
WAIT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """How long it goes on."""

    refits: int = 3_000
    settled: int = 300
    """Growth is counted from here on: caches fill first."""
    every: int = 100
    """Refits between two looks at the memory."""
    limit: float = 1.0
    """MiB of growth in 1,000 refits that are one too many."""


QUICK = Plan(refits=40, settled=20, every=10, limit=1e9)


def measure(plan: Plan, folder: Path, log: Callable[[str], None]) -> dict[int, int]:
    """Number of refits -> the server's resident memory in bytes.

    Raises:
        RunError: the server does not come, or its memory grows faster than the plan allows.
    """
    import numpy as np

    from nemo_aapo.engines.remote.dispatch import Call, Fleet
    from nemo_aapo.engines.remote.weight_store import WeightStore
    from nemo_aapo.models.reader import WeightFiles
    from nemo_aapo.types import SamplingSpec

    make_input(Workload(), folder)
    directory, found = folder / "run" / "servers", {}
    fleet = Fleet(directory, servers=1, wait_s=WAIT_S, timeout_s=WAIT_S, retries=0)
    store, weights = WeightStore(directory, str(folder / "model")), WeightFiles(folder / "model")
    spec, prompts = SamplingSpec(1.0, 4, (3,)), [np.arange(4, 9, dtype=np.int32)]
    with server(folder) as pid:
        for version in range(1, plan.refits + 1):
            given = store.write(((name, tensor + 1e-5 * version) for name, tensor in weights.items()), version)
            fleet.generate(Call(given, prompts, spec, [[version, version + 1]], lambda i, j, completion: None))
            store.prune(keep=[given])
            if version % plan.every == 0:
                found[version] = resident(pid)
                log(f"{version:>6} refits  {found[version] / MIB:8.2f} MiB")
    if (grown := growth(found, plan)) > plan.limit:
        raise RunError(f"the server's memory grew by {grown:.2f} MiB in 1,000 refits; {plan.limit:g} are allowed")
    return found


def growth(found: Mapping[int, int], plan: Plan) -> float:
    """MiB in 1,000 refits, once it has settled."""
    return (found[plan.refits] - found[plan.settled]) / MIB / (plan.refits - plan.settled) * 1_000


def resident(pid: int) -> int:
    """A process's resident memory, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def server(folder: Path, index: int = 0) -> Iterator[int]:
    """A server of the model in a folder; its process id."""
    words = [f"model.path={folder}/model", f"run.dir={folder}/run", "rollout.engine=remote"]
    words += [f"data.{part}={folder}/{part}.jsonl" for part in ("train", "validation")]
    words += [f"rollout.server.index={index}"]
    command = [sys.executable, "-m", "nemo_aapo.cli", "serve", "experiment=quickstart", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            yield server.pid
        finally:
            server.terminate()
