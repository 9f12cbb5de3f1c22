"""Starts the contestants, checks that both sides compute the same, and has them take turns."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import make_input
from benchmarks.peers.orders import Step, Worker
from benchmarks.peers.plan import OURS, Comparison, Lengths, Model, Plan
from nemo_aapo.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"

AGREEING = ("ours", "trl")
"""The contestants that compute the same; a first comparison of theirs shows that they do."""
MAX_LOGPROB_DIFFERENCE = 1e-5
"""Largest mean absolute difference of log-probs, over all tokens."""
MAX_LOSS_DIFFERENCE = 1e-5
"""Largest difference of losses, which are means of advantages of about 1."""
MAX_GRADIENT_DIFFERENCE = 1e-3
"""Largest relative difference of gradient norms."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The measured steps of one contestant in one comparison, with one model and number of threads."""

    model: str
    lengths: Lengths
    threads: int
    arm: str
    """The comparison."""
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
    comparisons: tuple[Comparison, ...]
    """Those that are measured."""
    large_vocabulary: str | None = None
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
    large = plan.large_vocabulary
    found = Found(trl_version(), plan.comparisons, large.name if large else None)
    for model in plan.models:
        for lengths, comparisons in plan.comparisons_of(model).items():
            sizes, place = plan.sized_for(model), folder / model.name / lengths
            place.mkdir(parents=True)
            with contextlib.closing(Contestants(sizes, place, make_input(model, sizes, lengths, place))) as contestants:
                for comparison in comparisons:
                    pair = contestants.only(comparison.ours, comparison.theirs)
                    if (comparison.ours, comparison.theirs) == AGREEING and comparison is comparisons[0]:
                        found.agreements.append(_agree(model.name, lengths, contestants))
                    for threads in plan.threads:
                        log(f"{model.name}, arm {comparison.arm}, {threads} {'thread' if threads == 1 else 'threads'}")
                        for name, steps in _in_turns(plan.repeats, threads, pair).items():
                            found.cells.append(Cell(model.name, lengths, threads, comparison.arm, name, tuple(steps)))
                        yield found
                contestants.only()
            found.memory += [Memory(model.name, lengths, name, peak) for name, peak in contestants.peaks.items()]
            for name, seconds in contestants.fill_cpu.items():
                if name == "ours_stored":
                    found.fill_cpu[f"{model.name}, {lengths}"] = seconds
    if large:
        log(f"memory, {large.name}")
        found.memory += _large_memory(large, plan, folder / "memory")
    yield found


def _in_turns(repeats: int, threads: int, pair: dict[str, Worker]) -> dict[str, list[Step]]:
    """Steps in turns A, B, A, B, ..., so that load on the machine affects both alike. The first round is left out."""
    steps: dict[str, list[Step]] = {name: [] for name in pair}
    for turn in range(repeats + 1):
        for name, worker in pair.items():
            step = worker.step(threads)
            if turn:
                steps[name].append(step)
    return steps


def _agree(model: str, lengths: Lengths, contestants: Contestants) -> Agreement:
    """Have TRL take its first step and ours train on the same completions, and require that they agree."""
    ours, trl = contestants.only(*AGREEING).values()
    trl.step(1)
    agreement = Agreement(model, lengths, **ours.ask("agree", file=str(contestants.recorded)))
    agreement.require()
    return agreement


def _large_memory(model: Model, plan: Plan, place: Path) -> list[Memory]:
    """Take two steps at the large vocabulary: during the second the optimizer has its state."""
    place.mkdir(parents=True)
    paths = make_input(model, plan, "fixed", place)
    with contextlib.closing(Contestants(plan, place, paths, record=False)) as contestants:
        for name in AGREEING:  # one at a time: they are large
            [worker] = contestants.only(name).values()
            worker.step(1)
            worker.step(1)
        contestants.only()
    return [Memory(model.name, "fixed", name, peak) for name, peak in contestants.peaks.items()]


class Contestants:
    """The contestants' processes, of which only those that are compared just now are alive: they may be large."""

    def __init__(self, plan: Plan, place: Path, paths: dict[str, str], record: bool = True) -> None:
        """
        Args:
            place: gets their specs, logs and folders.
            paths: what ``make_input`` returned.
            record: have TRL record its first step for ``_agree``, which takes more memory.
        """
        self._plan, self._place, self._paths = plan, place, paths
        self._alive: dict[str, Worker] = {}
        self.recorded = place / "recorded.json" if record else None
        self.peaks: dict[str, int] = {}
        """The most memory, in bytes, of each contestant that has ended."""
        self.fill_cpu: dict[str, float] = {}
        """CPU seconds that each took for its stored reference rewards before its first step."""

    def only(self, *names: str) -> dict[str, Worker]:
        """End all others, start the ones that are not alive, and wait until these are ready."""
        for name in [name for name in self._alive if name not in names]:
            self.peaks[name] = self._alive[name].ask("memory")["peak_bytes"]
            self._alive.pop(name).close()
        missing = [name for name in names if name not in self._alive]
        for name in missing:
            self._alive[name] = self._start(name)
        for name in missing:
            self.fill_cpu[name] = self._alive[name].wait()["fill_cpu"]
        return {name: self._alive[name] for name in names}

    def close(self) -> None:
        """End all. Idempotent."""
        while self._alive:
            self._alive.popitem()[1].close()

    def _start(self, name: str) -> Worker:
        module = "our_side" if name in OURS else "trl_side"
        sizes = ("prompts_per_step", "group_size", "prompt_tokens", "new_tokens")
        spec: dict[str, Any] = {
            "name": name,
            "plan": {size: getattr(self._plan, size) for size in sizes},
            **self._paths,
        }
        spec["folder"] = str(self._place / name)
        spec["record"] = str(self.recorded) if self.recorded and name == "trl" else None
        # the most threads that any step takes; each order says how many
        variables = environment(peers=module == "trl_side", threads=max(self._plan.threads))
        return Worker(name, f"benchmarks.peers.{module}", spec, self._place, variables)


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
