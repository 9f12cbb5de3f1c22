"""Makes the study's runs: each in a process of its own, forked from one that has imported everything.

A run of 60 steps takes seconds, and importing torch, Megatron and Hydra takes as long: forked processes share it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.study.design import Run
from examples.study.tasks import make_base
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.utils.files import FINISHED, write_atomic

LIMIT_S, POLL_S = 600.0, 0.05
"""A run that takes longer is ended; how often is looked."""
SHOWN_LINES = 15
"""Lines of a failed run's output that are shown."""
COST, WORDS = "cost.json", "words.json"
"""Beside a run's own files: what it cost, and its settings."""


@dataclass(frozen=True, slots=True)
class Running:
    """A run's process."""

    run: Run
    directory: Path
    began: float
    """By ``time.monotonic``."""


def make_runs(runs: Sequence[Run], study: Path, jobs: int, log: Callable[[str], None]) -> None:
    """Make every run that is not finished, so many at a time; what was broken off begins anew or goes on.

    Raises:
        ConfigError: settings that can't work, or a directory that holds a run with others; before anything is made.
        RunError: a run failed or took too long; the others at hand are ended, too.
    """
    check(runs, study)
    for task in {run.task.name: run.task for run in runs}.values():
        make_base(task, study / "bases" / task.name, log)
    waiting = [run for run in runs if not (run.directory(study) / FINISHED).exists()]
    log(f"{len(runs) - len(waiting)} of {len(runs)} runs are there already")
    if waiting:
        warm_up()
    running: dict[int, Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[_start(run, study)] = Running(run, run.directory(study), time.monotonic())
            _collect(running, lambda ended: log(f"{ended}; {len(waiting) + len(running)} to come"))
            time.sleep(POLL_S)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def check(runs: Sequence[Run], study: Path) -> None:
    """Refuse what can't be a run, and a directory whose run had other settings."""
    from nemo_aapo import load_config

    load_config(runs[0].words(study))
    for run in runs:
        path = run.directory(study) / WORDS
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != run.words(study):
            raise ConfigError(f"{path.parent} holds a run with other settings; another --out leaves it alone")


def warm_up() -> None:
    """Import, in this process, what each run would import for itself; torch keeps to one thread in all of them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import hydra  # noqa: F401
    import torch

    import nemo_aapo.jobs.train  # noqa: F401
    from nemo_aapo.mcore.bridge import loader
    from nemo_aapo.mcore.cpu import patches

    torch.set_num_threads(1)
    patches.install()
    loader.auto_bridge_class("Qwen2ForCausalLM")


def _start(run: Run, study: Path) -> int:
    """Fork a process that makes the run; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = _train(run, study)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(run: Run, study: Path) -> int:
    """In the forked process: train, with all output in the run's log."""
    directory = run.directory(study)
    write_atomic(directory / WORDS, json.dumps(run.words(study)) + "\n")
    with (directory / "output.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from nemo_aapo import load_config, train

    return train(load_config(run.words(study)), **run.task.parts())


def _collect(running: dict[int, Running], log: Callable[[str], None]) -> None:
    """Take out the processes that have ended; what each cost is kept beside its metrics."""
    for pid, found in list(running.items()):
        ended, status, used = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - found.began
        if not ended:
            if seconds > LIMIT_S:
                raise RunError(f"{found.directory}: not done after {LIMIT_S:.0f} s; see output.log there")
            continue
        del running[pid]
        if status or not (found.directory / FINISHED).exists():
            raise RunError(f"the run in {found.directory} failed; its log ends in:\n{_end_of_log(found.directory)}")
        cost = {"wall_s": round(seconds, 2), "cpu_s": round(used.ru_utime + used.ru_stime, 2)}
        write_atomic(found.directory / COST, json.dumps(cost) + "\n")
        last = read_metrics(found.directory / "metrics.jsonl")[-1]
        name = f"{found.run.task.name}, {found.run.arm}, seed {found.run.seed}"
        log(f"{name}: {last.get('validation/accuracy_sampled', 0.0):.3f} in {cost['cpu_s']:.0f} CPU s")


def _end_of_log(directory: Path) -> str:
    text = (directory / "output.log").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-SHOWN_LINES:])
