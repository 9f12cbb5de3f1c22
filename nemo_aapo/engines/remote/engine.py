"""The ``remote`` engine: completions from rollout servers, refit through a directory that both sides see.

One rank of each model-parallel group talks to the servers and tells the others; rank 0 alone writes weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree, on_first_rank
from nemo_aapo.engines.base import OnFinish, PendingCompletions, RolloutStats
from nemo_aapo.engines.collective.refit import CollectiveRefit, Sender
from nemo_aapo.engines.deltas import DeltaStore
from nemo_aapo.engines.elsewhere import Finished, arranged, stats_of
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.remote.directory import Claim, ServerRecord
from nemo_aapo.engines.remote.dispatch import Call, Fleet, MovingWeights
from nemo_aapo.engines.remote.fleet_status import FleetWatch
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.wire import ANY_TOKEN
from nemo_aapo.engines.weights import Weights, WeightsId
from nemo_aapo.errors import Interrupted, RunError
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.safetensors import model_digest

Outcome = Finished | Exception
"""What came of a call to the servers: the completions, or the error."""


class RemoteEngine:
    """A ``BackgroundEngine`` whose work is done by the servers of one directory."""

    def __init__(
        self,
        fleet: Fleet,
        store: WeightStore,
        base: Weights,
        claim: Claim | None,
        routes: bool = False,
        sender: Sender | None = None,
        takes_turns: bool = False,
        in_flight: Literal["keeps_kv", "recomputes_kv"] | None = None,
    ) -> None:
        """
        Args:
            fleet: the servers.
            store: where weights are left for them.
            base: the base model's weights, which servers start with: version 0.
            claim: on rank 0, the right to the servers.
            routes: completions without the experts that each token was sent to are refused.
            sender: sends weights to the servers in place of leaving them in the store.
            takes_turns: the servers compute on the learner's devices, while it does not.
            in_flight: what ``start`` starts goes on by weights that come meanwhile, and what becomes of keys and values
                then; None: by those that it began with.
        """
        self.fleet, self.store, self.claim, self.sender = fleet, store, claim, sender
        self.shares_weights, self._takes_turns = False, takes_turns
        self.stats: RolloutStats | None = None
        self._weights, self._routes = base, routes
        self._versions = {base.id.policy_version: base}  # those that need not be written
        self.refit_bytes = 0
        fleet.whole_of = store.whole_of
        self._watch = FleetWatch(fleet.directory)
        self._under_way: list[Weights] = []  # of the calls that were started and not waited for, and of pushes
        self._calls: list[Future[Outcome]] = []  # in flight, those of this rank that may not have ended
        self._digests = {base.id.policy_version: base.id.digest}
        self.moving = MovingWeights(lambda: self._weights, self._digests, in_flight) if in_flight else None

    @classmethod
    def from_config(
        cls,
        config: Config,
        sender: Sender | None = None,
        admit: Callable[[ServerRecord], None] = lambda server: None,
        vocab_size: int = ANY_TOKEN,
    ) -> RemoteEngine:
        """Make the engine that ``rollout.remote`` describes. Collective.

        Args:
            sender: for a ``rollout.refit`` without files.
            admit: raises where a server must not be used.
            vocab_size: the model's; a server that sends other token ids is left out.

        Raises:
            ConfigError: directory or token are open to others, or another client has the servers load its weights.
        """
        remote, path = config.rollout.remote, config.model.path
        fleet = agree(
            lambda: Fleet(
                remote.directory,
                servers=remote.servers,
                min_servers=remote.min_servers,
                wait_s=remote.wait_s,
                timeout_s=remote.timeout_s,
                retries=remote.retries,
                patience_s=config.cluster.signal_s / 2,
                admit=admit,
                share=(parallel.data_parallel_rank(), parallel.data_parallel_size()),
                vocab_size=vocab_size,
            )
        )
        claim = agree(lambda: Claim(fleet.directory, config.run.dir) if parallel.rank() == 0 else None)
        base = Weights(WeightsId(0, on_first_rank(lambda: model_digest(path))), None)
        store = (DeltaStore if config.rollout.refit == "delta" else WeightStore)(Path(remote.directory), path)
        routes, takes_turns = bool(config.rollout.replay_routes), config.rollout.refit == "ipc"
        in_flight: Literal["keeps_kv", "recomputes_kv"] | None = None
        if config.rollout.max_lag is not None:
            in_flight = "recomputes_kv" if config.rollout.recompute_kv else "keeps_kv"
        return cls(fleet, store, base, claim, routes, sender, takes_turns, in_flight)

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
        ask = functools.partial(self._ask_servers, self._weights, prompts, sampling, seeds, on_finish)
        return self._on_all_ranks(ask, seeds, on_finish, time.perf_counter())

    def start(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> PendingCompletions:
        """See ``BackgroundEngine.start``; ``result`` raises what ``generate`` would have."""
        answered: Future[Outcome] = Future()
        weights = self._weights
        if parallel.is_model_parallel_source():
            number = self.fleet.queues.enter(weights.id)  # here, where calls begin in their order
            ask = functools.partial(
                self._ask_servers, weights, prompts, sampling, seeds, on_finish, number, self.moving
            )
            # A daemon: a run that ends in an error meanwhile does not wait for it.
            threading.Thread(target=lambda: answered.set_result(ask()), name="rollouts", daemon=True).start()
            if self.moving is not None:
                self._calls.append(answered)
        began = time.perf_counter()
        if self.moving is None:
            self._under_way.append(weights)

        def result() -> list[list[Completion]]:
            if self.moving is None:
                self._under_way.remove(weights)
            return self._on_all_ranks(answered.result, seeds, on_finish, began)

        return _Pending(result, answered)

    def _ask_servers(
        self,
        weights: Weights,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None,
        number: int | None = None,
        moving: MovingWeights | None = None,
    ) -> Outcome:
        """Have the servers generate; called on the source rank alone, and not collective."""
        finished: Finished = []

        def keep(i: int, j: int, completion: Completion) -> None:
            if self._routes and completion.routes is None:
                raise RunError(
                    "rollout.replay_routes=true, but a rollout server sends completions without the experts that their "
                    "tokens were sent to: start the servers with the settings of this run"
                )
            finished.append((i, j, completion))
            if on_finish is not None and on_finish(i, j, completion):
                raise _Enough

        try:
            self.fleet.generate(Call(weights, prompts, sampling, seeds, keep, moving), number)
        except _Enough:  # its connections are closed, and servers drop what nobody waits for
            return finished
        except Exception as error:  # raised by ``_on_all_ranks``
            return error
        return finished

    def _on_all_ranks(
        self, ask: Callable[[], Outcome], seeds: Sequence[Sequence[int]], on_finish: OnFinish | None, began: float
    ) -> list[list[Completion]]:
        """What the source rank got, or its error, on all ranks of its model-parallel group.

        Args:
            began: the call's beginning by ``time.perf_counter``, for the statistics.
        """
        source = parallel.is_model_parallel_source()
        outcome: Outcome = parallel.broadcast_when_done(ask)
        if isinstance(outcome, Exception):
            raise outcome
        if on_finish is not None and not source:
            for finished in outcome:
                on_finish(*finished)
        self.stats = stats_of(outcome, time.perf_counter() - began)
        return arranged(outcome, seeds)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Bring the weights to the servers, by the directory or by the sender. Collective over all ranks of the job.

        Within one life of this engine a version names the same weights: those that are there are not written again
        (``named_tensors`` then stays unread, on all ranks).

        Raises:
            ConfigError: the servers have another client.
            RunError: they can't be written, or no server takes them; older versions are as they were.
        """
        first = parallel.rank() == 0
        agree(lambda: self.claim.take() if self.claim and version not in self._versions else None)

        if self.sender is not None and version not in self._versions:
            self._weights, self.refit_bytes = CollectiveRefit(self.fleet, self.sender).bring(version)
            return

        def write() -> Weights:
            if first:
                return self.store.write(named_tensors, version)
            deque(named_tensors, maxlen=0)  # the part that this rank has in making them
            return self._weights  # rank 0's come in its place

        self.refit_bytes = 0
        if version not in self._versions:
            self._versions[version] = parallel.broadcast_from_first_rank(agree(write))
            self.refit_bytes = self.store.written_bytes
        self._digests[version] = self._versions[version].id.digest
        if self.moving is not None:
            parallel.barrier()  # all ranks know the digest before any of them asks a server for these weights
        self._weights = self._versions[version]
        if self.moving is not None:
            self._move(first)
        elif not self._under_way:  # else each server takes them when it has ended what is
            agree(lambda: self.fleet.prepare(self._weights) if first else None)
        # The base model, which is the reference, comes back; older ones of the policy's that nothing waits for don't.
        under_way = tuple(self._under_way)  # which a push that ends meanwhile leaves
        needed = min([version, *(weights.id.policy_version for weights in under_way)])
        self._versions = {v: weights for v, weights in self._versions.items() if v == 0 or v >= needed}
        if first:
            self.store.prune(keep=self._versions.values())

    def _move(self, first: bool) -> None:
        """Have the servers take the newest weights between two decoding steps; the learner does not wait for that."""
        self._calls = [call for call in self._calls if not call.done()]
        if not parallel.any_rank(bool(self._calls))[0]:
            agree(lambda: self.fleet.prepare(self._weights, at_once=True) if first else None)
        elif first:
            self._under_way.append(weights := self._weights)

            def push() -> None:
                try:
                    with contextlib.suppress(Interrupted, RunError):  # what is generated meets with the same
                        self.fleet.push(weights)
                finally:
                    self._under_way.remove(weights)

            threading.Thread(target=push, name="refit", daemon=True).start()

    def server_metrics(self) -> dict[str, float]:
        """See ``ReportsServers.server_metrics``."""
        return self._watch.metrics() if parallel.rank() == 0 else {}

    def sleep(self) -> None:
        """Have servers on the learner's devices give back their memory; others have their own. Collective."""
        if self._takes_turns:
            parallel.barrier()  # every rank has its completions
            agree(lambda: self.fleet.sleep() if parallel.rank() == 0 else None)

    def wake(self) -> None:
        """Give back what the learner doesn't use: servers on its devices wake at the first request. Collective."""
        if self._takes_turns:
            memory.give_back()
            parallel.barrier()

    def close(self) -> None:
        """Remove the weights that were left for the servers; they go on serving what they have loaded."""
        if self.sender is not None:
            self.sender.close()
        if self.claim:
            self.store.prune(keep=())
            self.claim.drop()


class _Enough(Exception):
    """Whoever asked for the completions wants no more of them."""


@dataclass(frozen=True)
class _Pending:
    """``PendingCompletions`` that a thread is waiting for."""

    result: Callable[[], list[list[Completion]]]
    answered: Future[Outcome]

    def error(self) -> Exception | None:
        """See ``PendingCompletions.error``."""
        outcome = self.answered.result() if self.answered.done() else None
        return outcome if isinstance(outcome, Exception) else None
