"""A rollout server of several ranks: rank 0 answers requests, and every call to its engine is made on all of them.

Each rank holds its part of the model, and they generate together as the ranks of a trainer do (``engines/megatron``).
Between calls rank 0 lets the others hear from it every few seconds (``worker.IDLE_S``). So a rank that is gone is
noticed by then at the latest, and one that hangs within ``rollout.remote.timeout_s``. The server then ends as a whole:
whatever started it starts it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import first_error
from nemo_aapo.distributed.lost_ranks import lost_ranks_reported
from nemo_aapo.engines.base import InFlight, InFlightEngine, More, OnFinish, RolloutEngine
from nemo_aapo.engines.build import HostedEngine
from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.weights import WeightsId
from nemo_aapo.errors import LostRankError, RunError, ServerError, first_line
from nemo_aapo.types import Completion, SamplingSpec

_ALIKE = (ValueError, ArithmeticError, RunError, ServerError)
"""What an engine raises on all ranks, or between two collectives: the server can go on. Anything else ends it."""


def led(hosted: HostedEngine) -> HostedEngine:
    """On rank 0: the same engine, whose calls are made on all ranks."""
    ranks = _Ranks(hosted)

    @contextmanager
    def meeting(where: Rendezvous, weights: WeightsId) -> Iterator[Callable[[], int]]:
        ranks.call("meet", where, weights)

        def take() -> int:
            ranks.call("take")
            return ranks.taken

        yield take

    return HostedEngine(
        cast(RolloutEngine, _LedEngine(ranks)),
        lambda folder, version: ranks.call("load", folder, version),
        hosted.tensors,
        hosted.can_break_off,
        meeting,
        lambda: ranks.call("idle"),
        hosted.kv_cache_use,
        hosted.prompt_tokens,
    )


def follow(hosted: HostedEngine) -> None:
    """On the other ranks: do what rank 0 says, until it says that it is over.

    Raises:
        LostRankError: another rank is gone.
    """
    ranks = _Ranks(hosted)
    while ranks.follow_once():
        pass


class _Ranks:
    """One rank of the server: the calls, as each rank makes them."""

    def __init__(self, hosted: HostedEngine) -> None:
        self.hosted = hosted
        self._met = ExitStack()
        self._take: Callable[[], int] | None = None
        self.taken = 0
        """Bytes of this rank's part of what the trainer has sent."""

    def call(self, name: str, *arguments: Any, **here: Any) -> None:
        """On rank 0: have all ranks make a call.

        Args:
            here: arguments of rank 0 alone: whom it tells and asks.

        Raises:
            What it raised here, or else on the first other rank.
            LostRankError: a rank is gone.
        """
        with lost_ranks_reported(lambda: name):
            dist.broadcast_object_list([(name, arguments)], src=0)
        self._make(name, arguments, here)

    def follow_once(self) -> bool:
        """On the others: wait for the next call and make it; False: it was the last."""
        box: list[Any] = [None]
        with lost_ranks_reported(lambda: "waiting for requests"):
            dist.broadcast_object_list(box, src=0)
        name, arguments = box[0]
        with contextlib.suppress(_Told):
            self._make(name, arguments, {})
        return name != "close"

    def _between(self, between: Callable[[], More | None] | None) -> More | None:
        """Between two decoding steps: on rank 0 what it has to say, which may make calls; on the others make those."""
        if between is not None:
            more = between()
            dist.broadcast_object_list([("go on", more)], src=0)
            return more
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            name, arguments = box[0]
            if name == "go on":
                return cast("More | None", arguments)
            with contextlib.suppress(_Told):
                self._make(name, arguments, {})

    def _make(self, name: str, arguments: Sequence[Any], here: dict[str, Any]) -> None:
        error: Exception | None = None
        with lost_ranks_reported(lambda: name):
            try:
                self._run(name, arguments, here)
            except LostRankError:
                raise
            except _ALIKE as raised:
                error = raised
            error = first_error(error)
        if error is not None:
            raise error if dist.get_rank() == 0 else _Told from error

    def _run(self, name: str, arguments: Sequence[Any], here: dict[str, Any]) -> None:
        """Raises: LostRankError: the others can't know of what happened here, and may wait for this rank in vain."""
        try:
            getattr(self, name)(*arguments, **here)
        except (*_ALIKE, dist.DistError):
            raise
        except Exception as error:
            if "gloo/transport" in str(error):
                raise
            raise LostRankError(
                f"rank {dist.get_rank()}: {name} failed, the server ends ({first_line(error)})"
            ) from error

    # ------------------------------------------------------------------ the calls

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> None:
        """``RolloutEngine.generate``; rank 0 alone says when it is enough."""
        self.hosted.engine.generate(prompts, sampling, seeds, _heard(on_finish))

    def generate_in_flight(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        recompute_kv: bool,
        prompt_tokens: int,
        on_finish: OnFinish | None = None,
        between: Callable[[], More | None] | None = None,
    ) -> None:
        """``InFlightEngine.generate_in_flight``: all ranks take up at one step what rank 0 does."""
        engine = self.hosted.engine
        assert isinstance(engine, InFlightEngine), "only Megatron's engine has several ranks"
        in_flight = InFlight(lambda: self._between(between), recompute_kv, prompt_tokens)
        engine.generate_in_flight(prompts, sampling, seeds, _heard(on_finish), in_flight)

    def load(self, folder: Path, version: int) -> None:
        """Take over the weights of a directory, which all ranks see."""
        self.hosted.load(folder, version)

    def meet(self, where: Rendezvous, weights: WeightsId) -> None:
        """Meet the trainer's ranks."""
        assert self.hosted.meeting is not None, "only Megatron's engine has several ranks"
        self._met.close()
        self._take = self._met.enter_context(self.hosted.meeting(where, weights))

    def take(self) -> None:
        """Take over what they send."""
        assert self._take is not None, "meet() comes first"
        with self._met.pop_all():
            self.taken = self._take()

    def idle(self) -> None:
        """Show that all ranks are there."""

    def close(self) -> None:
        """The last call."""
        self._met.close()
        self.hosted.engine.close()


def _heard(on_finish: OnFinish | None) -> OnFinish:
    """On all ranks: what rank 0's callback says."""

    def tell(i: int, j: int, completion: Completion) -> bool:
        return parallel.broadcast_from_first_rank(bool(on_finish is not None and on_finish(i, j, completion)))

    return tell


class _Told(Exception):
    """A call failed alike on all ranks; rank 0 says so."""


class _LedEngine:
    """As much of a ``RolloutEngine`` as a server's worker uses."""

    def __init__(self, ranks: _Ranks) -> None:
        self._ranks = ranks

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingSpec, seeds: Sequence[Sequence[int]], on_finish: OnFinish
    ) -> None:
        with _raised_here(on_finish) as tell:
            self._ranks.call("generate", prompts, sampling, seeds, on_finish=tell)

    def generate_in_flight(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish,
        in_flight: InFlight,
    ) -> None:
        shared = in_flight.recompute_kv, in_flight.prompt_tokens
        with _raised_here(on_finish) as tell:
            call = self._ranks.call
            call("generate_in_flight", prompts, sampling, seeds, *shared, on_finish=tell, between=in_flight.between)

    def wake(self) -> None:
        """Megatron's engine takes what it needs by itself."""

    def sleep(self) -> None:
        """It gives back what it has by itself."""

    def close(self) -> None:
        self._ranks.call("close")


@contextmanager
def _raised_here(on_finish: OnFinish) -> Iterator[OnFinish]:
    """A callback that ends the call on all ranks where ``on_finish`` raises, which is raised then."""
    raised: list[Exception] = []

    def tell(i: int, j: int, completion: Completion) -> bool:
        try:
            return bool(on_finish(i, j, completion))
        except Exception as error:  # here alone: the others have to be told to end, too
            raised.append(error)
            return True

    yield tell
    if raised:
        raise raised[0]
