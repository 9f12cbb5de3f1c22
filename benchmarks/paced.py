"""A run whose engines and learner wait instead of computing, so that two cores stand for many GPUs.

All between them is the real thing: loop, rollout pipeline, dispatch, HTTP, servers with their workers, and the refit
through a directory. Only the last link is a stand-in: ``PacedEngine`` takes a fixed time for a token, of lengths that
the seeds decide, and ``PacedLearner`` a fixed time for a token that it is trained on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.workload import MeanToken, Silent
from nemo_aapo.planning.simulation.decoding import Engine
from nemo_aapo.planning.simulation.lengths import LogNormal
from nemo_aapo.planning.simulation.schedule import Seconds
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Completion, Group, Prompt, SamplingSpec

if TYPE_CHECKING:
    from nemo_aapo.config import Config
    from nemo_aapo.engines.base import InFlight
    from nemo_aapo.training.trainer import AAPOTrainer

WAIT_S = 120.0
VOCABULARY = 1000
AGREE = {"parity/mult_prob_error": 1.0, "parity/gen_kl": 0.0}


@dataclass(frozen=True)
class Pace:
    """Sizes of a step and the speed of both sides."""

    servers: int = 4
    prompts: int = 16
    group_size: int = 4
    mean_tokens: float = 30.0
    tail_factor: float = 5.0
    """Longest completion of a step over the mean."""
    token_s: float = 0.04
    """Seconds of a decoding step of a server, whatever the number of its sequences."""
    train_token_s: float = 0.001
    """Seconds of the learner on one completion token."""
    steps: int = 14

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    def length(self, seed: int) -> int:
        """Tokens of the completion with this seed."""
        lengths = LogNormal(self.mean_tokens, self.tail_factor, self.completions, limit=1 << 20)
        return lengths.draw(1, str(seed))[0]


def engine_of(pace: Pace) -> Engine:
    """A server, for simulations: it has rows for all."""
    return Engine(1 << 20, lambda rows, context: pace.token_s, prompt_tokens=0)


def lengths_of(pace: Pace, seed: int, prompts: int | None = None) -> list[list[list[int]]]:
    """By step and prompt, the lengths that the seeds decide; of so many prompts a step, where more are generated."""
    return [
        [
            [pace.length(stream_seed(seed, "rollout", step, i, j)) for j in range(pace.group_size)]
            for i in range(prompts or pace.prompts)
        ]
        for step in range(pace.steps)
    ]


def planned(pace: Pace, lengths: Sequence[Sequence[Sequence[int]]], train_token_s: float) -> Seconds:
    """What a simulation knows beforehand of a run with these lengths, whose prompts go round the servers."""
    engine = engine_of(pace)
    return Seconds(
        generate=[[engine.seconds(groups[s :: pace.servers]) for s in range(pace.servers)] for groups in lengths],
        train=[train_token_s * sum(map(sum, groups)) for groups in lengths],
    )


def step_seconds(pace: Pace, folder: Path, *words: str, after: int = 1) -> tuple[float, float]:
    """Of a run at this pace, from the end of its first ``after`` steps on: mean seconds of a step, mean lag of a token.

    Args:
        folder: an empty one.
        words: settings such as ``rollout.async_depth=2``.
    """
    from nemo_aapo.config.compose import load_config

    config = load_config(
        [
            "experiment=quickstart",
            "algorithm=gpg",
            "algorithm.importance_weight_cap=2.0",
            f"run.dir={folder}",
            *(f"{name}={folder}" for name in ("model.path", "data.train", "data.validation")),
            "rollout.engine=remote",
            f"rollout.remote.servers={pace.servers}",
            f"prompts_per_step={pace.prompts}",
            f"group_size={pace.group_size}",
            f"trainer.max_steps={pace.steps}",
            "trainer.val_check_interval=0",
            "checkpoint.save_interval=100000",
            *words,
        ]
    )
    (folder / "config.json").write_text("{}")
    with serving(pace, folder / "servers"), contextlib.ExitStack() as stack:
        trainer, clock = _trainer(pace, config, folder, stack)
        trainer.fit()
    counted = len(clock.ends) - after
    return (clock.ends[-1] - clock.ends[after - 1]) / counted, sum(clock.lags[after:]) / counted


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank of a job; nothing here needs Megatron."""
    import torch.distributed as dist

    from nemo_aapo.distributed import parallel

    parallel.join(WAIT_S)
    world = dist.group.WORLD
    parallel.use(parallel.Groups(world, world, world, world, world, world))
    try:
        yield
    finally:
        parallel.leave()


# ---------------------------------------------------------------- the servers' side


class PacedEngine:
    """Generates a token of every sequence in each ``token_s``: no sequence waits for a row."""

    shares_weights, stats, refit_bytes = False, None, 0

    def __init__(self, pace: Pace) -> None:
        self.pace, self.version = pace, 0

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: Callable[[int, int, Completion], object],
    ) -> None:
        """See ``RolloutEngine.generate``; the completions go to ``on_finish`` alone."""
        began = time.perf_counter()
        places = ((self.pace.length(seed), i, j, seed) for i, row in enumerate(seeds) for j, seed in enumerate(row))
        for length, i, j, seed in sorted(places):
            time.sleep(max(0.0, began + length * self.pace.token_s - time.perf_counter()))
            on_finish(i, j, _completion(seed, length, self.version))

    def generate_in_flight(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: Callable[[int, int, Completion], object],
        in_flight: InFlight,
    ) -> None:
        """See ``InFlightEngine``: a decoding step in each ``token_s``, at whose end more may come."""
        live: list[tuple[int, int, int, int, list[int]]] = []  # prompt, number, seed, length, versions of its tokens
        count, more = 0, (prompts, seeds)
        while True:
            for i, row in enumerate(more[1], count):
                live += [(i, j, seed, self.pace.length(seed), []) for j, seed in enumerate(row)]
            count += len(more[1])
            if not live:
                return
            time.sleep(self.pace.token_s)
            for _, _, _, _, versions in live:
                versions.append(self.version)
            for i, j, seed, length, versions in [entry for entry in live if len(entry[4]) == entry[3]]:
                several = np.array(versions, np.int32) if versions[0] != versions[-1] else None
                on_finish(i, j, _completion(seed, length, versions[0], several))
            live = [entry for entry in live if len(entry[4]) < entry[3]]
            if (asked := in_flight.between()) is None:
                return
            more = asked

    def update_weights(self, named_tensors: object, version: int) -> None:
        self.version = version

    def load(self, folder: Path, version: int) -> None:
        self.update_weights((), version)

    def wake(self) -> None: ...
    def sleep(self) -> None: ...
    def close(self) -> None: ...


def _completion(seed: int, length: int, version: int, versions: np.ndarray | None = None) -> Completion:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)
    return Completion(tokens, np.zeros(length, np.float32), "stop", version, versions=versions)


@contextlib.contextmanager
def serving(pace: Pace, place: Path) -> Iterator[None]:
    """Rollout servers with paced engines in threads of this process, announced in a directory."""
    from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish

    directory = open_directory(place)
    token, loop = open_token(directory), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = []
    try:
        for index in range(pace.servers):
            begun = asyncio.run_coroutine_threadsafe(_start(pace, directory, token, index), loop)
            worker, runner, address = begun.result(WAIT_S)
            started.append((worker, runner))
            publish(directory, ServerRecord(index, address, 0, f"paced{index}"))
        yield
    finally:
        for worker, runner in started:
            worker.stop(WAIT_S)
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)


async def _start(pace: Pace, directory: Path, token: str, index: int) -> tuple[Any, Any, str]:
    """One server: its worker, its runner and its address."""
    from aiohttp import web

    from nemo_aapo.engines.build import HostedEngine
    from nemo_aapo.engines.deltas import VersionReader
    from nemo_aapo.engines.remote import wire
    from nemo_aapo.engines.remote.service import Service
    from nemo_aapo.engines.remote.worker import EngineWorker

    engine, reader = PacedEngine(pace), VersionReader(directory, directory / f"copy_{index}")
    worker = EngineWorker(
        lambda: HostedEngine(engine, engine.load, frozenset({"w"}), can_break_off=True),
        base,
        reader.whole,
    )
    runner = Service(worker, token, wire.Limits(VOCABULARY, 1 << 20), 1 << 24).runner()
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return worker, runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def base() -> Any:
    """The name of the weights that servers begin with."""
    from nemo_aapo.engines.weights import WeightsId

    return WeightsId(0, "0" * 64)


# ---------------------------------------------------------------- the trainer's side


class PacedPolicy:
    """A version, and one small tensor that stands for the weights."""

    def __init__(self) -> None:
        self.version = 0

    def named_weights(self) -> Iterator[tuple[str, Any]]:
        import torch

        yield "w", torch.full((256,), float(self.version))

    def reference_weights(self) -> Any:
        raise NotImplementedError("no algorithm here has a reference")


class PacedLearner:
    """Waits for each token that it is given; the policy is a version further then."""

    def __init__(self, pace: Pace, policy: PacedPolicy) -> None:
        self.pace, self.policy = pace, policy

    def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        return AGREE

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        time.sleep(self.pace.train_token_s * sum(len(c.token_ids) for group in groups for c in group.completions))
        self.policy.version += 1
        return dict(AGREE)


class Clock(Silent):
    """A reporter that notes when each step ended, and how old its tokens were."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.lags: list[float] = []

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.ends.append(time.perf_counter())
        self.lags.append(metrics["rollout/lag"])

    def begin(self, step: int) -> None: ...
    def stop_requested(self) -> bool:
        return False


class Nothing:
    """Keeps, saves and measures nothing: in place of the trainer's other parts."""

    seconds, resumed_from = 0.0, None

    def resume(self, policy: object, mode: object) -> None: ...
    def save(self, *arguments: object) -> None: ...
    def failed(self) -> bool:
        return False

    def wait(self) -> None: ...
    def begin(self, step: int) -> None: ...
    def end(self) -> None: ...
    def close(self) -> None: ...
    def choose(self, step: int, groups: object) -> list[Any]:
        return []

    def write(self, step: int, kept: object) -> None: ...
    def metrics(self, groups: object, seconds: Mapping[str, float]) -> dict[str, float]:
        return {}


def _trainer(pace: Pace, config: Config, folder: Path, stack: contextlib.ExitStack) -> tuple[AAPOTrainer, Clock]:
    """The real loop around a paced learner and paced servers; this process has joined the ranks."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.config.sizes import prompts_drawn
    from nemo_aapo.data.sampler import PromptSampler
    from nemo_aapo.engines.remote.dispatch import Fleet
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from nemo_aapo.engines.remote.weight_store import WeightStore
    from nemo_aapo.engines.weights import Weights
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.rollout.collector import Collector
    from nemo_aapo.rollout.in_flight import InFlightPipeline
    from nemo_aapo.rollout.in_order import InOrderPipeline
    from nemo_aapo.training.trainer import AAPOTrainer

    directory, policy, clock, nothing = folder / "servers", PacedPolicy(), Clock(), Nothing()
    fleet = Fleet(directory, servers=pace.servers, wait_s=WAIT_S, timeout_s=WAIT_S, retries=0)
    in_flight: Any = None if config.rollout.max_lag is None else "keeps_kv"
    weights = Weights(base(), None)
    engine = RemoteEngine(fleet, WeightStore(directory, str(folder)), weights, None, in_flight=in_flight)
    stack.callback(engine.close)
    rewards = stack.enter_context(RewardRunner([(MeanToken(), 1.0)], workers=0, timeout_s=WAIT_S))
    data = [Prompt(str(i), np.array([5, i], np.int32), str(i), "0", f"made:{i}") for i in range(pace.prompts * 8)]
    kind = InOrderPipeline if config.rollout.max_lag is None else InFlightPipeline
    pipeline = kind(
        config=config,
        policy=policy,
        collector=Collector(engine, rewards, lambda tokens: ""),
        sampling=SamplingSpec(1.0, 1 << 12, ()),
        prompts=data,
        sampler=PromptSampler(len(data), prompts_drawn(config), config.seed),
        reference=None,
    )
    learner: Any = PacedLearner(pace, policy)
    trainer = AAPOTrainer(
        config=config,
        policy=policy,  # type: ignore[arg-type]
        rollouts=pipeline,
        objective=Objective.of(config.algorithm, config.rollout.max_new_tokens),
        learner=learner,
        validator=nothing,  # type: ignore[arg-type]
        checkpoints=nothing,  # type: ignore[arg-type]
        kept=nothing,  # type: ignore[arg-type]
        throughput=nothing,
        tracer=nothing,
        reporter=clock,  # type: ignore[arg-type]
    )
    return trainer, clock
