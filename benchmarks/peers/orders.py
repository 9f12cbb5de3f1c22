"""One step when told to: JSON lines between the process that measures and those that are measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.errors import RunError

ANSWER_TIMEOUT_S = 600.0
END_TIMEOUT_S = 30.0
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step of a contestant cost."""

    wall: float
    """Seconds of the clock."""
    cpu: float
    """Seconds of the process on cores, all threads."""
    tokens: int
    """Completion tokens that were trained on."""
    longest_over_mean: float
    """Of the completions' lengths."""
    loss: float
    phases: dict[str, float]
    """Seconds of the clock: rollout, score (rewards, advantages), reference, train, refit."""


class Worker:
    """A contestant's process, seen from outside."""

    def __init__(self, name: str, module: str, spec: dict[str, Any], folder: Path, environment: dict[str, str]) -> None:
        """Starts it; ``wait`` for it to be ready.

        Args:
            module: what to run as ``python -m``; it is given the path of the spec.
            spec: any JSON.
            folder: for the spec and the log.
        """
        self.name, self._log = name, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(spec))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )

    def wait(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            RunError: it has ended, or says nothing for ``ANSWER_TIMEOUT_S``.
        """
        deadline, line = time.monotonic() + ANSWER_TIMEOUT_S, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                why = "ended" if ready else f"said nothing for {ANSWER_TIMEOUT_S:.0f} s"
                raise RunError(
                    f"{self.name} {why}; the end of its output:\n{self._log.read_text()[-SHOWN_CHARACTERS:]}"
                )
            line += part
        return json.loads(line)

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        with contextlib.suppress(BrokenPipeError):  # ``wait`` says how it ended
            self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
            self._process.stdin.flush()
        return self.wait()

    def step(self, threads: int) -> Step:
        """One training step."""
        return Step(**self.ask("step", threads=threads))

    def close(self) -> None:
        """End it, by force if it does not go by itself. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Orders:
    """The same pipe, seen from the contestant. What it prints goes to its log from then on."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = (0.0, 0.0)

    def next(self) -> dict[str, Any] | None:
        """The next order; None at the end. The clocks start."""
        line = sys.stdin.readline()
        self._began = (time.perf_counter(), time.process_time())
        return json.loads(line) if line else None

    def answer(self, **values: Any) -> None:
        """To the last order, or that one is ready for the first."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def answer_step(self, *, lengths: list[int], loss: float, phases: dict[str, float]) -> None:
        """What the step cost since it was ordered."""
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        tail = max(lengths) * len(lengths) / max(1, sum(lengths))
        self.answer(**asdict(Step(wall, cpu, sum(lengths), tail, loss, phases)))


def peak_bytes() -> int:
    """The most memory that this process ever held (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")
