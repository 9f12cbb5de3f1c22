"""Starts the contestants, checks that both sides compute the same, and has them take turns."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import make_checkpoint
from benchmarks.peers.orders import Step, Worker
from benchmarks.peers.plan import CONTESTANTS, OURS, Lengths, Model, Plan
from nemo_aapo.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"

MAX_LOGPROB_DIFFERENCE = 1e-5
"""Largest mean absolute difference of log-probs, over all tokens."""
MAX_LOSS_DIFFERENCE = 1e-5
"""Largest difference of losses, which are means of advantages of about 1."""
MAX_GRADIENT_DIFFERENCE = 1e-3
"""Largest relative difference of gradient norms."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The measured steps of one contestant with one model, kind of lengths and number of threads."""

    model: str
    lengths: Lengths
    threads: int
    contestant: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """The most memory that a contestant's process held, imports included."""

    model: str
    lengths: Lengths
    contestant: str
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """The figures of both sides for the same completions and checkpoint."""

    model: str
    lengths: Lengths
    logprobs: float
    """Mean absolute difference of the log-probs."""
    loss: float
    trl_loss: float
    gradient_norm: float
    trl_gradient_norm: float

    def require(self) -> None:
        """Raise RunError unless both sides agree: otherwise their speeds can't be compared."""
        gradient = abs(self.gradient_norm / self.trl_gradient_norm - 1)
        if (
            self.logprobs > MAX_LOGPROB_DIFFERENCE
            or abs(self.loss - self.trl_loss) > MAX_LOSS_DIFFERENCE
            or gradient > MAX_GRADIENT_DIFFERENCE
        ):
            raise RunError(f"ours and TRL do not compute the same on the same completions: {self}")


@dataclass(slots=True)
class Found:
    """All results so far."""

    trl: str
    """The version of TRL."""
    large_vocabulary: str
    """The model that is measured for memory only."""
    memory: list[Memory] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    fill_cpu: dict[str, float] = field(default_factory=dict)
    """Model and lengths -> CPU seconds of making the stored reference rewards, once."""


def trl_version() -> str:
    """The version of TRL in .venv-peers.

    Raises:
        RunError: TRL is not there, or not the version that requirements/peers.txt names.
    """
    [wanted] = re.findall(r"^trl==(\S+)", (ROOT / "requirements" / "peers.txt").read_text(), re.MULTILINE)
    if not (PEERS / f"trl-{wanted}.dist-info").is_dir():
        raise RunError(
            f"benchmark.py peers: {PEERS} has no trl {wanted}. Run `bash scripts/peers.sh`, which installs it there "
            "(and never into the environment of nemo_aapo), then this command again"
        )
    return wanted


def measure(plan: Plan, folder: Path, log: Callable[[str], None]) -> Iterator[Found]:
    """Measure everything; yields all results so far whenever there are more, so that an interruption loses little.

    Args:
        folder: gets checkpoints, specs and logs.
        log: called with a line for each part that is measured.

    Raises:
        RunError: no TRL, a contestant that failed, or sides that do not agree.
    """
    found = Found(trl_version(), plan.large_vocabulary.name)
    for model in plan.models:
        for lengths in plan.lengths:
            place = folder / model.name / lengths
            make_checkpoint(model, plan, lengths, place / "model")
            with _contestants(plan, place, CONTESTANTS[lengths]) as workers:
                _agree(found, model, lengths, place, workers)
                for threads in plan.threads:
                    log(f"{model.name}, {lengths} lengths, {threads} {'thread' if threads == 1 else 'threads'}")
                    found.cells += _in_turns(plan, model, lengths, threads, workers)
                    yield found
                found.memory += _peaks(model, lengths, workers)
    log(f"memory, {plan.large_vocabulary.name}")
    _measure_memory(plan, folder / "memory", found)
    yield found


def _in_turns(plan: Plan, model: Model, lengths: Lengths, threads: int, workers: dict[str, Worker]) -> list[Cell]:
    """Steps in turns A, B, A, B, ..., so that load on the machine affects all alike. The first round is not counted."""
    steps: dict[str, list[Step]] = {name: [] for name in workers}
    for turn in range(plan.repeats + 1):
        for name, worker in workers.items():
            step = worker.step(threads)
            if turn:
                steps[name].append(step)
    return [Cell(model.name, lengths, threads, name, tuple(done)) for name, done in steps.items()]


def _agree(found: Found, model: Model, lengths: Lengths, place: Path, workers: dict[str, Worker]) -> None:
    """Have TRL take its first step and ours train on the same completions, and require that they agree."""
    for name, worker in workers.items():
        ready = worker.wait()
        if name == "ours_stored":
            found.fill_cpu[f"{model.name}, {lengths}"] = ready["fill_cpu"]
    workers["trl"].step(1)
    agreement = Agreement(model.name, lengths, **workers["ours"].ask("agree", file=str(place / "recorded.json")))
    agreement.require()
    found.agreements.append(agreement)


def _measure_memory(plan: Plan, place: Path, found: Found) -> None:
    """Take two steps at the large vocabulary: during the second the optimizer has its state."""
    make_checkpoint(plan.large_vocabulary, plan, "fixed", place / "model")
    for name in ("ours", "trl"):  # one at a time: they are large
        with _contestants(plan, place, (name,), record=False) as workers:
            workers[name].wait()
            workers[name].step(1)
            workers[name].step(1)
            found.memory += _peaks(plan.large_vocabulary, "fixed", workers)


def _peaks(model: Model, lengths: Lengths, workers: dict[str, Worker]) -> list[Memory]:
    return [Memory(model.name, lengths, name, worker.ask("memory")["peak_bytes"]) for name, worker in workers.items()]


@contextlib.contextmanager
def _contestants(plan: Plan, place: Path, names: tuple[str, ...], record: bool = True) -> Iterator[dict[str, Worker]]:
    """The contestants' processes, not ready yet; they are ended on leaving.

    Args:
        record: have TRL record its first step for ``_agree``, which takes more memory.
    """
    sizes = ("prompts_per_step", "group_size", "prompt_tokens", "new_tokens")
    numbers = {key: value for key, value in asdict(plan).items() if key in sizes}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            module = "our_side" if name in OURS else "trl_side"
            spec: dict[str, Any] = {"name": name, "plan": numbers, "model": str(place / "model")}
            spec["folder"] = str(place / name)
            spec["record"] = str(place / "recorded.json") if record and name == "trl" else None
            # the most threads that any step takes; each order says how many
            variables = environment(peers=module == "trl_side", threads=max(plan.threads))
            worker = Worker(name, f"benchmarks.peers.{module}", spec, place, variables)
            stack.callback(worker.close)
            workers[name] = worker
        yield workers


def environment(*, peers: bool, threads: int = 1) -> dict[str, str]:
    """Environment of a process that imports this code and, with ``peers``, that of .venv-peers."""
    path = [str(ROOT), *([str(PEERS)] if peers else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
