"""The cost of starting a run, up to the end of its first step: scripts/train.py with its imports timed.

``measure`` starts ``python -m benchmarks.start SETTINGS``, which runs the script with ``__import__`` replaced by one
that counts the CPU seconds of each package's own modules, without those of the modules that they import.
"""

from __future__ import annotations

import builtins
import json
import os
import runpy
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure
from nemo_aapo.errors import RunError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
TARGET_S = 8.0
"""CPU seconds that the start of one rank on a CPU is to stay below."""
SHOWN = 8
"""Number of packages that get a line of their own."""
DEADLINE_S = 300
"""Deadline of each repeat."""
ANSWER = "START "
"""Start of the line on which the watched process prints its figures."""


@dataclass(frozen=True, slots=True)
class Start:
    """CPU seconds of one rank's start, user and system."""

    total: Figure
    imports: dict[str, float]
    """Package -> median CPU seconds of its own modules, most first."""
    before: float
    """CPU seconds before the first step besides imports: interpreter, configuration, groups, data, model."""
    step: float
    """CPU seconds of the first step, without its imports."""


def measure(settings: list[str], folder: Path, repeats: int) -> Start:
    """Measure the start of a run with these settings.

    Args:
        folder: gets a run directory for each repeat.

    Raises:
        RunError: a run failed, or took too long.
    """
    found = [_run([*settings, f"run.dir={folder / str(i)}"]) for i in range(repeats)]
    found = found[1:] or found  # the first may have had to compile modules
    packages = {name for run in found for name in run["imports"]}

    def middle(values: list[float]) -> float:
        return Figure.of(values).median

    imports = {name: middle([run["imports"].get(name, 0.0) for run in found]) for name in packages}
    return Start(
        total=Figure.of([run["total"] for run in found]),
        imports=dict(sorted(imports.items(), key=lambda item: -item[1])),
        before=middle([run["before"] for run in found]),
        step=middle([run["step"] for run in found]),
    )


def _run(settings: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.start", *settings]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        done = subprocess.run(
            command, cwd=SCRIPT.parents[1], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{' '.join(command)}: no first step within {DEADLINE_S} s") from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        raise RunError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(answers[0].removeprefix(ANSWER))


def report(start: Start) -> list[tuple[str, str]]:
    """Lines of a table: a part of the start, and its CPU seconds."""
    shown = list(start.imports.items())
    rows = [(f"importing {name}", seconds) for name, seconds in shown[:SHOWN]]
    rows.append((f"importing {len(shown) - SHOWN} other packages", sum(seconds for _, seconds in shown[SHOWN:])))
    rows += [("interpreter, configuration, groups, data, model", start.before), ("the first step", start.step)]
    lines = [(what, f"{seconds:.2f}") for what, seconds in rows]
    return [*lines, (f"import to first step (target: {TARGET_S:.0f})", start.total.text(2))]


# ------------------------------------------------------------------ inside the run


class _Watch:
    """Times every import, and the first step."""

    def __init__(self) -> None:
        self.own: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # for each import under way, the seconds of the imports within it
        self._import = builtins.__import__
        self._waiting = False  # True once the first step is waited for

    def __call__(self, name: str, *arguments: Any, **more: Any) -> Any:
        modules, began = len(sys.modules), time.process_time()
        self._inner.append(0.0)
        try:
            return self._import(name, *arguments, **more)
        finally:
            seconds, inner = time.process_time() - began, self._inner.pop()
            if len(sys.modules) > modules:  # otherwise the module had been imported before
                self.own[self._package(name, arguments)] += seconds - inner
                if self._inner:
                    self._inner[-1] += seconds
                self._watch_trainer()

    @staticmethod
    def _package(name: str, arguments: tuple[Any, ...]) -> str:
        relative = len(arguments) == 4 and arguments[3] > 0
        full = (arguments[0].get("__package__") or name) if relative else name
        top = full.partition(".")[0]
        return "the standard library" if top in sys.stdlib_module_names else top

    def _watch_trainer(self) -> None:
        """Once the trainer's class is imported, have its first step print the figures and end the process."""
        trainer_class = getattr(sys.modules.get("nemo_aapo.training.trainer"), "AAPOTrainer", None)
        if trainer_class is None or self._waiting:
            return
        self._waiting, train_step = True, trainer_class.train_step

        def timed(trainer: Any) -> None:
            before, imported = time.process_time(), sum(self.own.values())
            train_step(trainer)
            total, imports = time.process_time(), sum(self.own.values())
            found = {
                "total": total,
                "imports": dict(self.own),
                "before": before - imported,
                "step": total - before - (imports - imported),
            }
            print(f"\n{ANSWER}{json.dumps(found)}", flush=True)
            os._exit(0)

        trainer_class.train_step = timed


if __name__ == "__main__":
    builtins.__import__ = _Watch()
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
