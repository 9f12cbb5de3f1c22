"""A run whose engines and learner wait instead of computing, so that two cores stand for many GPUs.

All between them is the real thing: loop, rollout pipeline, dispatch, HTTP, servers with their workers, and the refit
through a directory. Only the last link is a stand-in: ``PacedEngine`` takes a fixed time for a token, of lengths that
the seeds decide, and the learner of ``paced_run.py`` a fixed time for a token that it is trained on.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_aapo.planning.simulation.decoding import Engine
from nemo_aapo.planning.simulation.lengths import LogNormal
from nemo_aapo.planning.simulation.schedule import Seconds
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Completion, SamplingSpec

if TYPE_CHECKING:
    from nemo_aapo.engines.base import InFlight

WAIT_S = 120.0
VOCABULARY = 1000


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

    engine: Any = PacedEngine(pace)
    reader = VersionReader(directory, directory / f"copy_{index}")
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
