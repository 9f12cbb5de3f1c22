"""The runs of the study: one process each, one after the other, each resumable by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.config.compose import load_config
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.run.directory import check_run_directory
from nemo_aapo.utils.files import FINISHED

TRAIN = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
SHOWN_LINES = 15
"""Lines of a failed run's output that are shown."""


@dataclass(frozen=True, slots=True)
class Study:
    """The compared algorithms, the seeds, and the budget of each run."""

    directory: Path
    algorithms: tuple[str, ...] = ("aapo", "gpg", "grpo")
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    steps: int = 100
    settings: tuple[str, ...] = ()
    """``KEY=VALUE`` settings of all runs."""

    def __post_init__(self) -> None:
        if len(set(self.algorithms)) != len(self.algorithms) or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"algorithms {self.algorithms}, seeds {self.seeds}: each only once")
        if self.steps < 1:
            raise ConfigError(f"steps {self.steps}: at least one")
        if len(self.seeds) < 2:
            raise ConfigError(f"seeds {self.seeds}: an interval needs at least two")

    def run_directory(self, algorithm: str, seed: int) -> Path:
        """The directory of a run."""
        return self.directory / algorithm / f"seed_{seed}"

    def overrides(self, algorithm: str, seed: int) -> list[str]:
        """The settings of a run; all but algorithm, seed and name are the same in all of them."""
        return [
            "experiment=quickstart",
            f"algorithm={algorithm}",
            f"seed={seed}",
            f"run.name={algorithm}_seed_{seed}",
            f"run.dir={self.run_directory(algorithm, seed)}",
            f"trainer.max_steps={self.steps}",
            f"trainer.val_check_interval={max(1, self.steps // 10)}",
            "export_hf_model=false",
            "exp_manager.create_tensorboard_logger=false",
            "validation.console_samples=0",
            *self.settings,
        ]


def run_all(study: Study, log: Callable[[str], None]) -> None:
    """Make every run that is not finished; an interrupted one goes on from its checkpoint.

    The seeds come in the outer loop, so that an unfinished study has all algorithms of some seeds.

    Raises:
        ConfigError: settings that can't work, or a directory that holds another run; before the first run starts.
        RunError: a run failed; shows the end of its output.
    """
    runs = [(algorithm, seed) for seed in study.seeds for algorithm in study.algorithms]
    for algorithm, seed in runs:
        check_run_directory(load_config(study.overrides(algorithm, seed)))
    for number, (algorithm, seed) in enumerate(runs, start=1):
        directory = study.run_directory(algorithm, seed)
        if (directory / FINISHED).exists():
            continue
        log(f"run {number} of {len(runs)}: {algorithm}, seed {seed}")
        _run(study.overrides(algorithm, seed), directory)


def _run(overrides: list[str], directory: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TRAIN), *overrides]
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "output.log"
    with log.open("a", encoding="utf-8") as output:
        status = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if status or not (directory / FINISHED).exists():
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])
        how = f"ended with status {status}" if status else "was stopped before its end"
        raise RunError(f"the run in {directory} {how}; the same command goes on from there. {log} ends in:\n{end}")
