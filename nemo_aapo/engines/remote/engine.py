"""The ``remote`` engine: completions from rollout servers, refit through a directory that both sides see.

One rank of each model-parallel group talks to the servers and tells the others; rank 0 alone writes weights.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import OnFinish, PendingCompletions, RolloutStats
from nemo_aapo.engines.remote.dispatch import Call, Fleet
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.wire import Weights, WeightsId
from nemo_aapo.models import directory as model_dir
from nemo_aapo.types import Completion, SamplingSpec

Drawn = list[tuple[int, int, Completion]]
"""Completions in the order in which they came."""
Outcome = Drawn | Exception


class RemoteEngine:
    """A ``BackgroundEngine`` whose work is done by the servers of one directory."""

    def __init__(self, fleet: Fleet, store: WeightStore, base: Weights) -> None:
        """
        Args:
            fleet: the servers.
            store: where weights are left for them.
            base: the base model's weights, which servers start with: version 0.
        """
        self.fleet, self.store = fleet, store
        self.shares_weights = False
        self.stats: RolloutStats | None = None
        self._weights = base
        self._versions = {base.id.policy_version: base}  # those that need not be written

    @classmethod
    def from_config(cls, config: Config) -> RemoteEngine:
        """By ``rollout.remote``. Collective.

        Raises:
            ConfigError: directory or token are open to others.
        """
        remote, path = config.rollout.remote, config.model.path
        fleet = parallel.agree(
            lambda: Fleet(
                remote.directory,
                servers=remote.servers,
                wait_s=remote.wait_s,
                timeout_s=remote.timeout_s,
                retries=remote.retries,
            )
        )
        base = Weights(WeightsId(0, parallel.on_first_rank(lambda: model_dir.digest(path))), None)
        return cls(fleet, WeightStore(Path(remote.directory), path), base)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``. Ranks other than the source are told of completions after the last has come.

        Raises:
            RunError: no server is left, or a prompt has failed too often; names each server and why.
            FloatingPointError: the model gave log-probs that are not finite.
        """
        draw = functools.partial(self._draw, self._weights, prompts, sampling, seeds, on_finish)
        return self._shared(draw, seeds, on_finish, time.perf_counter())

    def start(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> PendingCompletions:
        """See ``BackgroundEngine.start``; ``result`` raises what ``generate`` would have."""
        draw = functools.partial(self._draw, self._weights, prompts, sampling, seeds, on_finish)
        drawn: Future[Outcome] = Future()
        if parallel.is_model_parallel_source():
            # A daemon: a run that ends in an error meanwhile does not wait for it.
            threading.Thread(target=lambda: drawn.set_result(draw()), name="rollouts", daemon=True).start()
        return _Pending(functools.partial(self._shared, drawn.result, seeds, on_finish, time.perf_counter()))

    def _draw(
        self,
        weights: Weights,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None,
    ) -> Outcome:
        """On the source rank: ask the servers. No collective."""
        drawn: Drawn = []

        def keep(i: int, j: int, completion: Completion) -> None:
            drawn.append((i, j, completion))
            if on_finish is not None:
                on_finish(i, j, completion)

        try:
            if any(seeds):
                self.fleet.generate(Call(weights, prompts, sampling, seeds, keep))
        except Exception as error:  # raised by ``_shared``, on all ranks
            return error
        return drawn

    def _shared(
        self, draw: Callable[[], Outcome], seeds: Sequence[Sequence[int]], on_finish: OnFinish | None, began: float
    ) -> list[list[Completion]]:
        """What the source rank has drawn, on all ranks of its model-parallel group; or its error."""
        source = parallel.is_model_parallel_source()
        outcome = parallel.broadcast_in_model_parallel(draw() if source else None)
        if isinstance(outcome, Exception):
            raise outcome
        completions: list[list[Completion]] = [[None] * len(row) for row in seeds]
        for i, j, completion in outcome:
            completions[i][j] = completion
            if on_finish is not None and not source:
                on_finish(i, j, completion)
        self.stats = _stats([len(completion.token_ids) for _, _, completion in outcome], time.perf_counter() - began)
        return completions

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Leave the weights in the directory and have the servers load them. Collective over all ranks of the job.

        Within one life of this engine a version names the same weights: those that are there are not written again
        (``named_tensors`` then stays unread, on all ranks).

        Raises:
            RunError: they can't be written, or no server takes them; older versions are as they were.
        """
        first = parallel.rank() == 0
        if version not in self._versions:
            write = self.store.write if first else _read_through
            self._versions[version] = parallel.broadcast_from_first_rank(
                parallel.agree(lambda: write(named_tensors, version))
            )
        self._weights = self._versions[version]
        parallel.agree(lambda: self.fleet.prepare(self._weights) if first else None)
        # The base model, which is the reference, comes back; older ones of the policy's don't.
        self._versions = {v: weights for v, weights in self._versions.items() if v == 0 or v >= version}
        if first:
            self.store.prune(keep=self._versions.values())

    def sleep(self) -> None:
        """Nothing to give back: the servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Remove the weights that were left for the servers; they go on serving what they have loaded."""
        if parallel.rank() == 0:
            self.store.prune(keep=())


@dataclass(frozen=True)
class _Pending:
    """``PendingCompletions`` that a thread is waiting for."""

    result: Callable[[], list[list[Completion]]]


def _read_through(named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
    """Take part in making the tensors, which only rank 0 keeps."""
    deque(named_tensors, maxlen=0)


def _stats(lengths: Sequence[int], seconds: float) -> RolloutStats:
    return RolloutStats(
        tokens=sum(lengths),
        seconds=seconds,
        steps=0,
        tail_factor=max(lengths) * len(lengths) / sum(lengths) if sum(lengths) else 1.0,
        idle_fraction=float("nan"),
    )
