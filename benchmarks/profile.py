"""Counts of one training step by phase, from torch's profiler: operators, allocations and collectives.

The profiler sees this thread only, which on a CPU does all the work (the backward pass included).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "phase: "
PHASES = ("rollout", "layers, forward", "backward", "rest of train", "rest of step")
"""``layers, forward`` are the learner's layers; its log-probs, loss and optimizer are in ``rest of train``."""


@dataclass(slots=True)
class Phase:
    """Counts of one phase of a step on one rank."""

    operators: Counter[str] = field(default_factory=Counter)
    """Calls of torch's operators (``aten::``), inner ones included."""
    collectives: Counter[str] = field(default_factory=Counter)
    """Calls by kind (``c10d::``); a collective of objects makes two."""
    allocations: int = 0
    allocated_bytes: int = 0


@dataclass(slots=True)
class Step:
    """Counts of one step on one rank."""

    phases: dict[str, Phase]
    peak_bytes: int
    """Peak of the memory that was allocated since the step began."""


def profile_step(trainer: Any) -> Step:
    """Take a training step and count. Collective."""
    with _marked(trainer):
        events, _ = _trace(trainer.train_step)
    return _count(events)


def peak_bytes(step: Callable[[], object]) -> int:
    """Peak of the memory that tensors took beyond what was allocated before; of this thread."""
    events, _ = _trace(step)
    return _count(events).peak_bytes


def communication_share(trainer: Any) -> float:
    """Take a training step; the fraction of its wall time in which a gloo operation ran on this rank.

    Collective. Waiting for a later rank counts.
    """
    events, seconds = _trace(trainer.train_step)
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("gloo:") and "dur" in e)
    busy = end = 0.0
    for start, stop in spans:  # microseconds; they may overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (1e6 * seconds)


def _trace(step: Callable[[], object]) -> tuple[list[dict[str, Any]], float]:
    """The events of a step's Chrome trace, and the step's seconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    assert torch.get_num_threads() == 1, "other threads' work would be split by the number of cores"
    with tempfile.TemporaryDirectory(prefix="aapo_trace_") as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            began = time.perf_counter()
            step()
            seconds = time.perf_counter() - began
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"], seconds


# ------------------------------------------------------------------ marks


class _Learner:
    """The trainer's learner with its updates marked."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self.parity = learner.parity

    def update(self, groups: Any) -> dict[str, float]:
        with _mark("rest of train"):
            return self._learner.update(groups)


def _mark(phase: str) -> Any:
    from torch.profiler import record_function

    return record_function(MARK + phase)


@contextlib.contextmanager
def _marked(trainer: Any) -> Iterator[None]:
    """Inside, rollouts, updates and the learner's layers appear in a trace by their names."""
    from megatron.core.transformer import TransformerLayer

    learner, generate = trainer.learner, trainer.rollouts.generate

    def marked_generate(step: int) -> Any:
        with _mark("rollout"):
            return generate(step)

    open_marks: list[Any] = []

    def enter(*_: Any) -> None:
        open_marks.append(_mark("layers, forward"))
        open_marks[-1].__enter__()

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    trainer.learner, trainer.rollouts.generate = _Learner(learner), marked_generate
    layers = [module for module in trainer.policy.module.modules() if isinstance(module, TransformerLayer)]
    hooks = [hook for m in layers for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield
    finally:
        trainer.learner, trainer.rollouts.generate = learner, generate
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------ the trace


def _count(events: list[dict[str, Any]]) -> Step:
    """Counts of a Chrome trace's events: each belongs to the innermost mark around its start."""
    phases = {name: Phase() for name in PHASES}
    allocated = peak = 0
    marks: list[tuple[float, str]] = []  # end and phase of each open mark
    timed = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation", "cpu_instant_event")]
    for event in sorted(timed, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
        name, start = event["name"], event["ts"]
        while marks and marks[-1][0] <= start:
            marks.pop()
        if phase := _phase(name):
            marks.append((start + event["dur"], phase))
        counts = phases[marks[-1][1] if marks else "rest of step"]
        if name.startswith("aten::"):
            counts.operators[name.removeprefix("aten::")] += 1
        elif name.startswith("c10d::"):
            counts.collectives[name.removeprefix("c10d::").strip("_")] += 1
        elif name == "[memory]":
            size = event["args"]["Bytes"]
            allocated += size
            peak = max(peak, allocated)
            if size > 0:
                counts.allocations += 1
                counts.allocated_bytes += size
    return Step(phases, peak)


def _phase(name: str) -> str | None:
    """The phase that a range of the trace begins."""
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    return "backward" if name.startswith("autograd::engine::evaluate_function") else None
