"""Starts the contestants, sees that both sides compute the same, and has them take turns."""

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
"""Mean over all tokens."""
MAX_LOSS_DIFFERENCE = 1e-5
"""A loss is a mean of advantages, which are about 1."""
MAX_GRADIENT_DIFFERENCE = 1e-3
"""Of the gradient's norm, relative."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one contestant did under one model, kind of lengths and number of threads."""

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
    """Both sides on the same completions, from the same checkpoint."""

    model: str
    lengths: Lengths
    logprobs: float
    """Mean absolute difference."""
    loss: float
    trl_loss: float
    gradient_norm: float
    trl_gradient_norm: float

    def require(self) -> None:
        """Raises RunError: there is nothing to compare."""
        gradient = abs(self.gradient_norm / self.trl_gradient_norm - 1)
        if (
            self.logprobs > MAX_LOGPROB_DIFFERENCE
            or abs(self.loss - self.trl_loss) > MAX_LOSS_DIFFERENCE
            or gradient > MAX_GRADIENT_DIFFERENCE
        ):
            raise RunError(f"ours and TRL do not compute the same on the same completions: {self}")


@dataclass(slots=True)
class Found:
    """All of it, as far as it has come."""

    trl: str
    """Its version."""
    large_vocabulary: str
    """The model that is measured for memory only."""
    memory: list[Memory] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    fill_cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds that the stored reference rewards took, once, by model and lengths."""


def trl_version() -> str:
    """Of .venv-peers.

    Raises:
        RunError: it is not there, or not the version that requirements/peers.txt names.
    """
    wanted = re.search(r"^trl==(\S+)", (ROOT / "requirements" / "peers.txt").read_text(), re.MULTILINE)[1]
    if not (PEERS / f"trl-{wanted}.dist-info").is_dir():
        raise RunError(
            f"benchmark.py peers: {PEERS} has no trl {wanted}. Run `bash scripts/peers.sh`, which installs it there "
            "(and never into the environment of nemo_aapo), then this command again"
        )
    return wanted


def measure(plan: Plan, folder: Path, say: Callable[[str], None]) -> Iterator[Found]:
    """Everything, growing: yielded whenever there is more, so that an interruption costs the last part only.

    Args:
        folder: for checkpoints, specs and logs.
        say: told of what is being measured.

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
                    say(f"{model.name}, {lengths} lengths, {threads} {'thread' if threads == 1 else 'threads'}")
                    found.cells += _in_turns(plan, model, lengths, threads, workers)
                    yield found
                found.memory += _peaks(model, lengths, workers)
    say(f"memory, {plan.large_vocabulary.name}")
    _measure_memory(plan, folder / "memory", found)
    yield found


def _in_turns(plan: Plan, model: Model, lengths: Lengths, threads: int, workers: dict[str, Worker]) -> list[Cell]:
    """A, B, A, B, ...: what slows the machine down for a while hits all alike. The first round is not counted."""
    steps: dict[str, list[Step]] = {name: [] for name in workers}
    for turn in range(plan.repeats + 1):
        for name, worker in workers.items():
            step = worker.step(threads)
            if turn:
                steps[name].append(step)
    return [Cell(model.name, lengths, threads, name, tuple(done)) for name, done in steps.items()]


def _agree(found: Found, model: Model, lengths: Lengths, place: Path, workers: dict[str, Worker]) -> None:
    """TRL takes its first step; ours trains on the same completions."""
    for name, worker in workers.items():
        ready = worker.wait()
        if name == "ours_stored":
            found.fill_cpu[f"{model.name}, {lengths}"] = ready["fill_cpu"]
    workers["trl"].step(1)
    agreement = Agreement(model.name, lengths, **workers["ours"].ask("agree", file=str(place / "recorded.json")))
    agreement.require()
    found.agreements.append(agreement)


def _measure_memory(plan: Plan, place: Path, found: Found) -> None:
    """Two steps each at the large vocabulary: the second has the optimizer's state from the first."""
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
    """Their processes, starting up; all are ended on the way out.

    Args:
        record: have TRL write down its first step, for ``_agree``; that takes memory of its own.
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
            # the most threads; each step is told how many
            variables = environment(peers=module == "trl_side", threads=max(plan.threads))
            worker = Worker(name, f"benchmarks.peers.{module}", spec, place, variables)
            stack.callback(worker.close)
            workers[name] = worker
        yield workers


def environment(*, peers: bool, threads: int = 1) -> dict[str, str]:
    """Of a process that imports this code and, if it is wanted, the peers'."""
    path = [str(ROOT), *([str(PEERS)] if peers else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
