"""Training runs whose ranks are killed, and that have to end as if nothing had happened.

Ranks are forked from one warm server process (``multiprocessing``'s forkserver), as imports cost more than a whole
tiny run. They call ``nemo_aapo.train`` as ``scripts/train.py`` does. What kills them is put around functions of the
product from outside; the product knows nothing of it. SIGKILL leaves no process a chance to tidy up.
"""

from __future__ import annotations

import importlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from nemo_aapo.launch.local import free_port, rank_environments
from tests.forked import forking
from tests.training_runs import exported, make_input, metrics, run, settings

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
LIFE_S = 240.0
"""A run that takes longer hangs, however busy the machine."""
FAULT_TIMEOUT_S = 50.0
"""Survivors of a killed rank have to end within this, before ``trainer.distributed_timeout_s`` would end them."""
FULL_DISK_BYTES = 100_000
CLOCK = "clock"
POINTS = {
    # name: (module, attribute, kill before or after the call, which calls count, ranks that come by, calls to choose)
    "rollout": ("nemo_aapo.engines.megatron.batch", "Batch._forward", "before", "", "any", (1, 120)),
    "bank": ("nemo_aapo.rollout.saved.bank", "RolloutBank.add", "after", "", "first", (1, 4 * STEPS)),
    "backward": ("megatron.core.pipeline_parallel.schedules", "backward_step", "before", "", "any", (1, 16)),
    "update": ("nemo_aapo.learner.optimization", "Optimization.train_step", "after", "", "any", (1, STEPS)),
    "save": ("nemo_aapo.checkpoint.format", "_Writer.write_data", "after", "", "any", (1, 3)),
    "before rename": ("os", "rename", "before", "/.step_", "first", (1, 3)),
    "after rename": ("os", "rename", "after", "/.step_", "first", (1, 3)),
    "remove old": ("os", "rename", "after", "/step_", "first", (1, 2)),
    "metrics": ("nemo_aapo.run.metrics_file", "MetricsFile.append", "after", "", "first", (1, STEPS)),
    "export": ("os", "rename", "before", ".hf_model.partial", "first", (1, 1)),
}
"""Where a rank can kill itself."""
FULL_DISK = "full disk"
_HARMS = {**POINTS, FULL_DISK: ("nemo_aapo.checkpoint.format", "_Writer.write_data", "full", "", "any", (1, 3))}


@dataclass(frozen=True)
class Layout:
    """TP x PP, data-parallel ranks that share the experts of a model that has some, and how far rollouts run ahead."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    ahead: int = 0

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.ep

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}ep{self.ep}" + (f"L{self.ahead}" if self.ahead else "")


LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(ahead=1),
    Layout(pp=2),
    Layout(ahead=2),
    Layout(tp=2, pp=2),
    Layout(2, ahead=2),
)


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    point: str
    """Of ``POINTS``; ``CLOCK``: from outside, at any time; ``FULL_DISK``: it is not killed, but a save fails."""
    at: float
    """At which call; for ``CLOCK`` after which fraction of an uninterrupted run's time."""
    rank: int = 0
    everyone: bool = False
    """The other ranks are killed with it."""

    def __str__(self) -> str:
        who = "all" if self.everyone else f"rank {self.rank}"
        return f"{who} at {self.at:.0%} of the time" if self.point == CLOCK else f"{who} in {self.point} #{self.at:g}"


@dataclass(frozen=True)
class Life:
    """One start of a run, up to the end of its last rank."""

    kill: Kill | None
    codes: list[int]
    """Exit codes by rank; -9 where SIGKILL was the end."""
    seconds: float
    """From the first rank's end to the last one's."""
    hung: list[int]
    """Ranks that had to be killed, as they did not end in time."""

    def story(self) -> str:
        """In a few words."""
        if self.kill is None or -signal.SIGKILL in self.codes:
            return str(self.kill)
        return f"({self.kill}: over before)"


class Chaos:
    """Runs in one folder. Uninterrupted ones are made when they are first compared with, one for each layout."""

    def __init__(self, folder: Path, experts: bool = False) -> None:
        self.folder = folder
        make_input(folder, experts)
        self._context = forking()
        self._seconds: dict[Layout, float] = {}

    def survive(self, name: str, layout: Layout, kills: Sequence[Kill]) -> list[Life]:
        """Start a run, kill it, start it again, and so on until it is complete; compare it with an uninterrupted one.

        Raises:
            AssertionError: it hung, did not go on, or ended elsewhere.
        """
        self.uninterrupted(layout)
        run_dir = self.folder / name
        lives = [self.live(run_dir, layout, kill) for kill in (*kills, None)]
        for life in lives[:-1]:
            killed = -signal.SIGKILL in life.codes
            assert killed or not any(life.codes), f"failed before {life.kill} ({life.codes}); see {run_dir}.log.*"
            assert not life.hung, f"rank {life.hung} had to be killed after {life.kill}; see {run_dir}.log.*"
        assert lives[-1].codes == [0] * layout.world, f"the last start failed ({lives}); see {run_dir}.log.*"
        self.compare(run_dir, layout)
        return lives

    def compare(self, run_dir: Path, layout: Layout) -> None:
        """Weights to the bit, and every number of the metrics but times."""
        expected = self.uninterrupted(layout)
        assert (run_dir / "finished").exists()
        assert metrics(run_dir) == metrics(expected), f"{run_dir}: other metrics than {expected}"
        assert exported(run_dir) == exported(expected), f"{run_dir}: other weights than {expected}"
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{STEPS:06d}"]

    def uninterrupted(self, layout: Layout) -> Path:
        """The run directory of a run that nobody disturbed."""
        run_dir = self.folder / f"uninterrupted_{layout}"
        if layout not in self._seconds:
            self.live(self.folder / f"warm_up_{layout}", Layout(), Kill(CLOCK, 0))  # the server has imported all now
            self._seconds[layout] = 0.0
            start = time.monotonic()
            life = self.live(run_dir, layout, None)
            assert life.codes == [0] * layout.world, f"{life}; see {run_dir}.log.*"
            self._seconds[layout] = time.monotonic() - start
        return run_dir

    def live(self, run_dir: Path, layout: Layout, kill: Kill | None) -> Life:
        """Start all ranks, kill as told, and see the last one off."""
        words = self.words(run_dir, layout)
        environments = rank_environments({}, layout.world, free_port())
        ranks = [
            self._context.Process(
                target=_rank, args=(environment, words, kill, f"{run_dir}.log.{environment['RANK']}"), daemon=True
            )
            for environment in environments
        ]
        for rank in ranks:
            rank.start()
        if kill is not None and kill.point == CLOCK:
            wait([rank.sentinel for rank in ranks], timeout=kill.at * self._seconds.get(layout, 0.0))
            for rank in ranks if kill.everyone else [ranks[kill.rank]]:
                rank.kill()
        wait([rank.sentinel for rank in ranks], timeout=LIFE_S)
        return _see_off(ranks, kill)

    def words(self, run_dir: Path, layout: Layout) -> list[str]:
        """The settings of every run here."""
        return settings(
            self.folder,
            run_dir,
            f"trainer.max_steps={STEPS}",
            "trainer.val_check_interval=3",
            "checkpoint.keep_last=1",
            "model.optim.sched.warmup_steps=4",
            f"model.expert_model_parallel_size={layout.ep}",
            *((f"rollout.async_depth={layout.ahead}", "algorithm.importance_weight_cap=2.0") if layout.ahead else ()),
            tp=layout.tp,
            pp=layout.pp,
            world=layout.world,
        )


def draw(seed: int) -> tuple[Layout, list[Kill]]:
    """A layout and one to three kills at random points of it."""
    rng = random.Random(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    kills = []
    for before in range(rng.choice((1, 2, 2, 3))):
        point = rng.choice((CLOCK, CLOCK, CLOCK, *POINTS))
        rank = rng.randrange(layout.world)
        if point == CLOCK:
            at = rng.uniform(0, 1)
        else:
            first, last = POINTS[point][5]
            at = rng.randint(first, max(first, last // (before + 1)))  # later starts have less left to do
            rank = 0 if POINTS[point][4] == "first" else rank
        kills.append(Kill(point, at, rank, everyone=layout.world > 1 and rng.random() < 0.4))
    return layout, kills


def run_rank(words: list[str], kill: Kill | None) -> int:
    """One rank of a run, in whose way the kill may stand."""
    if kill is not None and kill.point != CLOCK and int(os.environ["RANK"]) == kill.rank:
        kill_at(kill.point, int(kill.at))
    return run(words)


def kill_at(point: str, call: int) -> None:
    """From now on, this process kills itself (or has a full disk) at the n-th call of a function of ``POINTS``."""
    module, path, when, argument, _, _ = _HARMS[point]
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, _killing(getattr(owner, name), call, when, argument))


def _killing(function: Callable[..., Any], call: int, when: str, argument: str) -> Callable[..., Any]:
    calls = 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += argument in str(args[0])
        due = calls == call and argument in str(args[0])
        if due and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and when == "full":  # no file may grow beyond this; writing ends in an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, resource.RLIM_INFINITY))
        result = function(*args, **kwargs)
        if due and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return killing


def _rank(environment: dict[str, str], words: list[str], kill: Kill | None, log: str) -> None:
    """In a process that was forked for it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.exit(run_rank(words, kill))


def _see_off(ranks: Sequence[Any], kill: Kill | None) -> Life:
    """The first rank has ended, or none in time: what the others do. They are told as every launcher tells them."""
    start = time.monotonic()
    if any(rank.exitcode for rank in ranks):
        for rank in ranks:
            if kill is not None and kill.everyone:
                rank.kill()
            elif kill is not None and kill.point == CLOCK:  # else they have to find out by themselves
                rank.terminate()
    for rank in ranks:
        rank.join(max(0.0, start + FAULT_TIMEOUT_S - time.monotonic()))
    seconds = time.monotonic() - start
    hung = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
    for number in hung:
        ranks[number].kill()
        ranks[number].join(FAULT_TIMEOUT_S)
    return Life(kill, [rank.exitcode for rank in ranks], seconds, hung)
