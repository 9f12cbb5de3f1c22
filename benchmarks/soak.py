"""A run over many steps, looked at from outside: what its processes hold must not grow with the steps."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.workload import Workload, make_input
from nemo_aapo.errors import RunError
from nemo_aapo.utils.tables import markdown

MIB = 2**20
POLL_S = 0.2
TAIL_BYTES = 1 << 16
"""A line of metrics is shorter."""
REMOTE = ("rollout.engine=remote", "rollout.remote.servers=1")
ASYNC = (*REMOTE, "rollout.async_depth=1", "algorithm.importance_weight_cap=2.0")
KINDS: Mapping[str, Sequence[str]] = {"local": (), "remote": REMOTE, "async": ASYNC}
"""Kind of run -> the settings that make it one."""


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    rss: float
    """Resident memory in MiB."""
    descriptors: int
    threads: int
    children: int

    def __str__(self) -> str:
        counts = f"{self.descriptors} descriptors, {self.threads} threads, {self.children} children"
        return f"{self.rss:.1f} MiB, {counts}"


@dataclass(frozen=True)
class Plan:
    """How long it goes on."""

    steps: int = 4_000
    settled: int = 400
    """Growth is counted from here on: caches fill first."""
    every: int = 100
    """Steps between two looks."""


Looks = dict[int, dict[str, Held]]
"""Step -> process (``trainer``, ``server``) -> what it holds."""


def measure(kind: str, plan: Plan, folder: Path, log: Callable[[str], None]) -> Looks:
    """Train in a process of its own, with a rollout server in another one where the kind has one.

    Raises:
        RunError: a process ended too early.
    """
    make_input(Workload(), folder)
    words = [
        "experiment=quickstart",
        f"model.path={folder}/model",
        *(f"data.{part}={folder}/{part}.jsonl" for part in ("train", "validation")),
        f"run.dir={folder}/run",
        f"trainer.max_steps={plan.steps + plan.every}",  # the last look comes before its end
        "trainer.val_check_interval=0",
        f"checkpoint.save_interval={plan.every}",
        "prompts_per_step=2",
        "group_size=2",
        "rollout.max_new_tokens=4",
        "model.optim.lr=1e-9",
        "export_hf_model=false",
        *KINDS[kind],
    ]
    started = {"trainer": "train"} if kind == "local" else {"server": "serve", "trainer": "train"}
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(command, words, folder / f"{name}.log"))
            for name, command in started.items()
        }
        return dict(_looks(processes, plan, folder, log))


def growth(looks: Looks, plan: Plan, process: str) -> dict[str, float]:
    """Of each quantity in 1,000 steps, from the first look at which it has settled to the last."""
    steps = [step for step in looks if step >= plan.settled]
    first, last = (asdict(looks[step][process]) for step in (steps[0], steps[-1]))
    return {name: (last[name] - first[name]) / (steps[-1] - steps[0]) * 1_000 for name in first}


def report(found: Mapping[str, Looks], plan: Plan) -> str:
    """A table in Markdown: what each process holds at the end, and how that grew."""
    rows = []
    for kind, looks in found.items():
        for process, held in looks[max(looks)].items():
            grown = growth(looks, plan, process)
            counts = [f"{getattr(held, name)} ({grown[name]:+.1f})" for name in ("descriptors", "threads", "children")]
            rows.append([f"{kind}, {process}", str(max(looks)), f"{held.rss:.1f} ({grown['rss']:+.2f})", *counts])
    return markdown(["run, process", "steps", "RSS in MiB", "descriptors", "threads", "children"], rows)


def _looks(
    processes: Mapping[str, subprocess.Popen[bytes]], plan: Plan, folder: Path, log: Callable[[str], None]
) -> Iterator[tuple[int, dict[str, Held]]]:
    """Whenever so many more steps are done."""
    metrics, due = folder / "run" / "metrics.jsonl", plan.every
    while due <= plan.steps:
        for name, process in processes.items():
            if process.poll() is not None:
                raise RunError(f"the {name} ended with {process.returncode}: {folder}/{name}.log")
        step = _last_step(metrics)
        if step < due:
            time.sleep(POLL_S)
            continue
        held = {name: held_by(process.pid) for name, process in processes.items()}
        log(f"{step:>6} steps  " + "  ".join(f"{name}: {of}" for name, of in held.items()))
        yield step, held
        due = step // plan.every * plan.every + plan.every


def held_by(pid: int) -> Held:
    """What a running process holds."""
    import psutil

    process = psutil.Process(pid)
    with process.oneshot():
        memory, descriptors, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    return Held(memory / MIB, descriptors, threads, len(process.children(recursive=True)))


def _last_step(metrics: Path) -> int:
    """Of the last whole line. Not of all lines: looking five times a second would cost more than the training."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


@contextlib.contextmanager
def _process(command: str, words: Sequence[str], said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of the package that is ended with the block."""
    with said.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "nemo_aapo.cli", command, *words], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
