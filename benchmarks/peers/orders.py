"""Orders to take a step, as JSON lines between the process that measures and the contestants."""

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
"""A contestant that does not end by itself in this time is killed."""
SHOWN_CHARACTERS = 2000
"""Characters of a failed contestant's output that are shown."""


@dataclass(frozen=True, slots=True)
class Step:
    """The cost of one training step of a contestant."""

    wall: float
    """Seconds of the clock."""
    cpu: float
    """Seconds of the process on cores, all threads."""
    tokens: int
    """Completion tokens that were trained on."""
    reference_tokens: int
    """Completion tokens that the reference generated in this step."""
    longest_over_mean: float
    """Longest length of a completion over the mean."""
    loss: float
    phases: dict[str, float]
    """Seconds of the clock: rollout, score (rewards, advantages), reference, train, refit."""


class Worker:
    """A contestant's process, as the measuring process holds it."""

    def __init__(self, name: str, module: str, spec: dict[str, Any], folder: Path, environment: dict[str, str]) -> None:
        """Start the process; ``wait`` for it to be ready.

        Args:
            module: run by ``python -m``, with the path of the spec as its argument.
            spec: JSON that tells the contestant what it is.
            folder: gets the spec and the log.
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
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"  # noqa: PT018
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def wait(self) -> dict[str, Any]:
        """The contestant's next answer.

        Raises:
            RunError: it has ended, or does not answer within ``ANSWER_TIMEOUT_S``.
        """
        deadline, line = time.monotonic() + ANSWER_TIMEOUT_S, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._answers.fileno(), 1 << 16) if ready else b""
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
            self._orders.write(json.dumps({"do": do, **order}).encode() + b"\n")
            self._orders.flush()
        return self.wait()

    def step(self, threads: int) -> Step:
        """Have the contestant take one training step."""
        return Step(**self.ask("step", threads=threads))

    def close(self) -> None:
        """End the process, by force if it does not end by itself. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


class Orders:
    """The contestant's end of the pipe. From its creation on, what the process prints goes to its log."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = (0.0, 0.0)

    def next(self) -> dict[str, Any] | None:
        """Wait for the next order, and start the clocks; None at the end."""
        line = sys.stdin.readline()
        self._began = (time.perf_counter(), time.process_time())
        return json.loads(line) if line else None

    def answer(self, **values: Any) -> None:
        """Answer the last order, or report that the contestant is ready for the first."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def answer_step(self, *, lengths: list[int], reference_tokens: int, loss: float, phases: dict[str, float]) -> None:
        """Answer with the cost of the step since it was ordered; ``lengths`` are of the completions trained on."""
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        tail = max(lengths) * len(lengths) / max(1, sum(lengths))
        self.answer(**asdict(Step(wall, cpu, sum(lengths), reference_tokens, tail, loss, phases)))


def peak_bytes() -> int:
    """The most memory that this process ever held (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")
