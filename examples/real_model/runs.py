"""The commands of the demonstration: what each run is, and what it costs.

<directory>/  model/  data/  reference_rewards.sqlite  aapo/  gpg/  grpo/  killed/  two_stages/  costs.json
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.errors import RunError
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.utils.files import FINISHED, whole_directory, write_atomic

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = ("aapo", "gpg", "grpo")
STEPS, SAVED_AT, KILLED_AFTER, COMPARED = 10, 5, 6, 7
"""Steps of a run; between its checkpoints; after which the twin of ``aapo`` is killed; that the twin makes in all."""
TRAINING_PROMPTS, VALIDATION_PROMPTS = 1000, 128
LIMIT_S = 3600
"""A command that takes longer is killed."""
SETTINGS = (
    "seed=1",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=5",
    "prompts_per_step=8",
    "group_size=8",
    "rollout.max_new_tokens=24",
    "rollout.max_concurrent_tokens=16384",
    "data.max_prompt_tokens=64",
    "model.optim.lr=5e-6",
    "rewards=[{name: integer, weight: 1.0}]",
    "reward_runner.workers=0",
    "validation.reward=integer",
    "validation.samples=0",
    f"checkpoint.save_interval={SAVED_AT}",
    "checkpoint.keep_last=1",
    "export_hf_model=false",
    "exp_manager.create_tensorboard_logger=false",
)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The directory in which everything is made, once."""

    directory: Path
    log: Callable[[str], None]

    # ------------------------------------------------------------------ the parts

    def model(self) -> None:
        """The pretrained model as a Hugging Face directory."""
        if not (self.directory / "model").exists():
            path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / ".venv-gguf")])}
            self._run("model", [sys.executable, "-m", "examples.real_model.model", str(self.directory / "model")], path)

    def data(self) -> None:
        """Sums of two-digit numbers, asked in words; none is both in training and held out."""
        sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        random.Random(0).shuffle(sums)
        ends = (0, VALIDATION_PROMPTS, VALIDATION_PROMPTS + TRAINING_PROMPTS)
        for name, start, end in zip(("validation", "train"), ends, ends[1:], strict=False):
            rows = [
                {"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)}
                for a, b in sums[start:end]
            ]
            write_atomic(self.directory / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def train(self, algorithm: str) -> None:
        """One run from the pretrained model."""
        if not (self.directory / algorithm / FINISHED).exists():
            self._run(algorithm, self.command("train.py", algorithm, algorithm))

    def resume(self) -> None:
        """The first steps of ``aapo`` again: killed, gone on alone; and gone on as two pipeline stages."""
        killed, two = self.directory / "killed", self.directory / "two_stages"
        shorter = f"trainer.max_steps={COMPARED}"
        if not two.exists():
            self._kill(self.command("train.py", "killed", "aapo", shorter), killed)
            with whole_directory(two) as partial:
                shutil.copytree(killed, partial, dirs_exist_ok=True)
        if not (killed / FINISHED).exists():
            self._run("killed", self.command("train.py", "killed", "aapo", shorter))
        if not (two / FINISHED).exists():
            stages = ("trainer.devices=2", "model.pipeline_model_parallel_size=2", "cluster=local")
            self._run("two_stages", self.command("launch.py", "two_stages", "aapo", shorter, *stages))

    def command(self, script: str, name: str, algorithm: str, *more: str) -> list[str]:
        """What trains in ``<directory>/NAME``."""
        words = [f"algorithm={algorithm}", f"run.name={name}", f"run.dir={self.directory / name}"]
        words += [f"model.path={self.directory / 'model'}"]
        words += [f"data.{part}={self.directory / 'data' / part}.jsonl" for part in ("train", "validation")]
        if algorithm == "aapo":  # its twins find the rewards that it has stored
            words += [f"algorithm.reference_store={self.directory / 'reference_rewards.sqlite'}"]
        return [sys.executable, str(ROOT / "scripts" / script), *words, *SETTINGS, *more]

    # ------------------------------------------------------------------ processes

    def _run(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.log(f"{name}: started; {self._log_of(name)} has its output")
        with self._costs(name):
            process = self._start(name, command, environment)
            try:
                status = process.wait(LIMIT_S)
            except (KeyboardInterrupt, subprocess.TimeoutExpired):
                process.terminate()  # it saves a checkpoint, and ends
                process.wait(120)
                raise
        if status:
            raise RunError(f"{name} ended with status {status}; see {self._log_of(name)}. The same command goes on")

    def _kill(self, command: Sequence[str], directory: Path) -> None:
        """Start a run and end it as the kernel does where memory is short, in the middle of a step."""
        self.log(f"killed: started; it is killed after step {KILLED_AFTER}")
        with self._costs("killed"):
            process = self._start("killed", command)
            try:
                deadline = time.monotonic() + LIMIT_S
                while steps_done(directory) < KILLED_AFTER:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RunError(f"killed: it made no {KILLED_AFTER} steps; see {self._log_of('killed')}")
                    time.sleep(0.2)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait(60)

    def _start(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
        threads = str(os.cpu_count()) if name != "two_stages" else "1"
        # cores that wait for each other asleep leave the rest of a busy machine alone
        calm = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        self._log_of(name).parent.mkdir(parents=True, exist_ok=True)
        with self._log_of(name).open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **calm, **(environment or {})}
            )

    def _log_of(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    @contextmanager
    def _costs(self, name: str):
        """Add what the processes inside cost to ``costs.json``: seconds of the clock and of CPUs, starts."""
        path = self.directory / "costs.json"
        began, cpu = time.monotonic(), _cpu_of_children()
        try:
            yield
        finally:
            costs = json.loads(path.read_text()) if path.exists() else {}
            cost = costs.get(name, {"wall_s": 0.0, "cpu_s": 0.0, "starts": 0})
            cost["wall_s"] = round(cost["wall_s"] + time.monotonic() - began, 1)
            cost["cpu_s"] = round(cost["cpu_s"] + _cpu_of_children() - cpu, 1)
            cost["starts"] += 1
            write_atomic(path, json.dumps({**costs, name: cost}, indent=1) + "\n")


def steps_done(directory: Path) -> int:
    """The last training step in a run's metrics; 0 without any."""
    path = directory / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path) if "loss" in line), default=0) if path.exists() else 0


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
