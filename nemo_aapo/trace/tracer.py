"""Records the steps of ``trace.steps`` and writes one file a step; on all other steps it does nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.run.names import TRACES, step_name
from nemo_aapo.trace import collectives, spans
from nemo_aapo.trace.file import Part, trace_of
from nemo_aapo.utils.background import BestEffort
from nemo_aapo.utils.files import write_atomic

MOST_SPANS = 400_000
"""Of a phase over all ranks: more than that no viewer likes to open."""
LEAST_OF_A_RANK, MOST_OF_A_RANK = 2_000, 50_000
"""Of a phase a rank keeps its share, within these."""


class Tracer:
    """``begin`` and ``end`` stand around a step; collective where the step is traced."""

    def __init__(self, run_dir: Path, steps: Sequence[int], note: Callable[[str], None]) -> None:
        """
        Args:
            run_dir: gets ``trace/step_000010.json``.
            steps: to be traced, counted from 1.
            note: takes a line for people.
        """
        self.directory, self.steps, self.note = run_dir / TRACES, frozenset(steps), note
        self._job = BestEffort("trace", note)
        self._recording = contextlib.ExitStack()
        self._step = 0
        self._met = (0, 0)

    def begin(self, step: int) -> None:
        """A step begins, counted from 1."""
        if step not in self.steps:
            return
        parallel.any_rank(False)  # so that all come to the next meeting at about the same time
        came = time.perf_counter_ns()
        parallel.any_rank(False)
        self._step, self._met = step, (came, time.perf_counter_ns())
        share = min(max(MOST_SPANS // dist.get_world_size(), LEAST_OF_A_RANK), MOST_OF_A_RANK)
        spans.start(f"rank {parallel.rank()}", share)
        self._recording.callback(spans.stop)
        self._recording.enter_context(collectives.recorded())

    def end(self) -> None:
        """The step has ended: its file is written in the background."""
        recorder = spans.recorder
        if recorder is None:
            return
        self._recording.close()
        part = Part(
            parallel.rank(), machine(), self._met, list(recorder.spans), list(recorder.samples), recorder.left_out
        )
        parts = parallel.gather_on_first_rank(part)
        if parts:
            step = self._step
            self._job.start(f"the trace of step {step}", lambda: self._write(step, parts))

    def close(self) -> None:
        """Record no more, and have what was recorded on the disk; a step that did not end leaves no file."""
        self._recording.close()
        self._job.wait()

    def _write(self, step: int, parts: Sequence[Part]) -> None:
        path = self.directory / f"{step_name(step)}.json"
        trace = trace_of(step, parts)
        write_atomic(path, json.dumps(trace, separators=(",", ":")))
        cut = trace["otherData"]["left_out"]
        more = f"; {cut:,} spans beyond what is kept of a phase are left out" if cut else ""
        self.note(f"trace of step {step}: {path}, to be opened in ui.perfetto.dev{more}")


def machine() -> str:
    """Names this machine since it was started, as long as its monotonic clock runs."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
