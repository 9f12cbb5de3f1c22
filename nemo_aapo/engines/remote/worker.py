"""The one thread of a rollout server that touches the engine: generation and refit, one after the other.

Requests that wait, and ask the same of the same weights, run as one batch. A refit waits for the batch before it, and
what comes after it waits for the refit, so that no completion is ever sampled from mixed weights. But a batch of
requests in flight (``GenerateRequest.refit``) takes up refits, and requests like them, between two decoding steps.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from nemo_aapo.engines.base import InFlight, InFlightEngine, More, OnFinish
from nemo_aapo.engines.build import HostedEngine
from nemo_aapo.engines.remote.batch import Batch, Failure, Item, Job, Load, Sleep
from nemo_aapo.engines.remote.wire import Weights, WeightsId
from nemo_aapo.errors import LostRankError, OtherWeightsError, RequestError, RunError, ServerError, WeightsError
from nemo_aapo.trace import servers as traced_servers
from nemo_aapo.trace import spans
from nemo_aapo.types import Completion

IDLE_S = 5.0
"""An engine of several ranks is called no later than this, so that they know of one another."""
MERGE_S = 0.02
"""Seconds that a batch waits for requests that were sent together with its first one."""


class _Aborted(Exception):
    """Nobody waits for the running batch any more."""


class EngineWorker:
    """Runs a ``HostedEngine`` in a thread of its own. All methods may be called from any thread."""

    def __init__(
        self,
        build: Callable[[], HostedEngine],
        base: Callable[[], WeightsId],
        locate: Callable[[Weights, Set[str]], AbstractContextManager[Path]],
    ) -> None:
        """
        Args:
            build: makes the engine with the base model's weights, in the worker's thread.
            base: their name.
            locate: checks every byte of the files of some weights, and that they hold the tensors of these names;
                their folder, which stays while it is held.
        """
        self.served: dict[int, str] = {}
        """Digests of the weights that it has served so far, by version; of the last ones, if there were several."""
        self.weights: WeightsId | None = None
        """The weights that the engine serves; None while it has none that are whole."""
        self.outstanding = 0
        """Number of completions that were asked for and are not generated yet."""
        self.refit_seconds = self.refit_bytes = math.nan
        """What the last refit took, once its turn had come, and the bytes of the weights that it loaded."""
        self.built: Future[None] = Future()
        """Done once there is an engine; holds the error if there can't be one."""
        self.lost: Future[LostRankError] = Future()
        """Done once one of the server's ranks is gone: nothing is generated any more."""
        self._build, self._base, self._locate = build, base, locate
        self._generated_s = 0.0  # by the batches that have ended
        self._began: float | None = None  # the batch that runs
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._hosted: HostedEngine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, job: Job) -> None:
        """Queue a request; its answers come through ``job.emit``."""
        self._put(job)

    def load(self, weights: Weights) -> Future[None]:
        """Queue a refit; nothing is loaded before all files were found to be whole."""
        load = Load(weights)
        self._put(load)
        return load.done

    def sleep(self) -> Future[None]:
        """Have the engine give back its devices' memory when its turn has come; the next batch wakes it."""
        sleep = Sleep()
        self._put(sleep)
        return sleep.done

    @property
    def waiting(self) -> int:
        """Number of requests and refits that wait for their turn."""
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """Seconds spent generating so far."""
        began = self._began
        return self._generated_s + (0.0 if began is None else time.perf_counter() - began)

    @property
    def kv_cache_use(self) -> float:
        """Share of the engine's KV cache that is in use now; NaN where it does not tell, and without an engine."""
        return self._hosted.kv_cache_use() if self.built.done() and not self.built.exception() else math.nan

    def stop(self, wait_s: float) -> bool:
        """Drop what waits, break off what runs at its next finished completion; True if the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _put(self, item: Item) -> None:
        with self._changed:
            if self._stopping:
                _drop(item)
                return
            if isinstance(item, Job):
                self.outstanding += item.request.sequences
            self._queue.append(item)
            self._changed.notify_all()

    def _count(self, sequences: int) -> None:
        with self._changed:
            self.outstanding += sequences

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._hosted = self._build()
            self._serve(self._base())
            self.built.set_result(None)
        except BaseException as error:  # for the main thread, which waits for it
            self.built.set_exception(error)
            return
        try:
            while (batch := self._next()) is not None:
                if isinstance(batch, Load):
                    self._load(batch)
                elif isinstance(batch, Sleep):
                    self._sleep(batch)
                else:
                    self._generate(batch)
            self._hosted.engine.close()
        except LostRankError as error:
            self.weights, self._stopping = None, True
            self.lost.set_result(error)
        for item in self._queue:
            _drop(item)

    def _next(self) -> list[Job] | Load | Sleep | None:
        """What to do next: a refit, a sleep, or a batch of requests that go together; None: stop."""
        while self._hosted.idle is not None and not self._wait(IDLE_S):
            self._hosted.idle()
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if not self._stopping and isinstance(self._queue[0], Job):
                self._changed.wait_for(lambda: self._stopping, MERGE_S)
            if self._stopping:
                return None
            first = self._queue.popleft()
            if not isinstance(first, Job):
                return first
            batch = [first]
            while self._queue and isinstance(following := self._queue[0], Job) and following.goes_with(first):
                batch.append(following)
                self._queue.popleft()
            return batch

    def _wait(self, seconds: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._queue or self._stopping, seconds))

    def _load(self, load: Load) -> None:
        if load.weights.id == self.weights:
            load.done.set_result(None)
            return
        touched, began = False, time.perf_counter()
        try:
            with self._at_hand(load.weights) as take:
                self.weights, touched = None, True  # half loaded: not ready until a whole version is
                self.refit_bytes = take()
        except Exception as error:  # what was not touched goes on being served
            if touched and not isinstance(error, RunError | ServerError):
                traceback.print_exc()
            print(f"refit to {load.weights.id} failed: {error}", file=sys.stderr, flush=True)
            load.done.set_exception(error)
            if isinstance(error, LostRankError):
                raise
            return
        self._serve(load.weights.id)
        self.refit_seconds = time.perf_counter() - began
        load.done.set_result(None)

    def _serve(self, weights: WeightsId) -> None:
        self.weights, self.served[weights.policy_version] = weights, weights.digest

    def _sleep(self, sleep: Sleep) -> None:
        try:
            self._hosted.engine.sleep()
        except LostRankError:
            sleep.done.cancel()
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            sleep.done.set_exception(error)
        else:
            sleep.done.set_result(None)

    @contextmanager
    def _at_hand(self, weights: Weights) -> Iterator[Callable[[], int]]:
        """Inside, all is there of some weights, and the call takes them over; it returns their bytes."""
        if weights.rendezvous is None:
            with self._locate(weights, self._hosted.tensors) as folder:

                def load() -> int:
                    self._hosted.load(folder, weights.id.policy_version)
                    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

                yield load
        elif self._hosted.meeting is None:
            raise WeightsError("this server's engine takes weights from files only: rollout.refit=files or delta")
        else:
            with self._hosted.meeting(weights.rendezvous, weights.id) as take:
                yield take

    def _generate(self, jobs: list[Job]) -> None:
        batch = Batch(jobs, self._hosted.prompt_tokens)

        def on_finish(number: int, j: int, completion: Completion) -> None:
            if not np.isfinite(completion.logprobs).all():  # JSON has no number for it
                raise FloatingPointError(f"the engine gave log-probs that are not finite, by {self.weights}")
            self._count(-1)
            batch.hand_over(number, j, completion)
            if self._stopping or (self._hosted.can_break_off and batch.abandoned):
                raise _Aborted

        self._began = time.perf_counter()
        _record(jobs)
        end: Failure | None = None
        try:
            if self.weights != batch.request.weights:
                end = self._other_weights()
            elif not batch.abandoned:
                engine = self._hosted.engine
                engine.wake()
                with spans.span(
                    "generate", "server", prompts=len(batch.prompts), completions=batch.left, requests=len(jobs)
                ):
                    if batch.in_flight:
                        end = self._generate_in_flight(batch, on_finish)
                    else:
                        engine.generate(batch.prompts, batch.request.sampling, batch.seeds, on_finish)
        except _Aborted:
            end = _STOPPING
        except RequestError as error:
            end = Failure("request", str(error))
        except FloatingPointError as error:
            end = Failure("not_finite", str(error))
        except LostRankError as error:
            batch.end(Failure("engine", str(error)))
            raise
        except Exception as error:  # the client learns of it and asks elsewhere; the rest is for this server's log
            traceback.print_exc(file=sys.stderr)
            end = Failure("engine", f"the engine failed: {type(error).__name__}: {error}")
        if any(job.recorder for job in jobs):
            spans.stop()
        self._count(-batch.left)
        self._generated_s, self._began = self.busy_seconds, None
        batch.end(end)

    def _generate_in_flight(self, batch: Batch, on_finish: OnFinish) -> Failure | None:
        """Run a batch that takes up refits and more requests as they come; why it had to end before its end."""
        engine, request, end = self._hosted.engine, batch.request, None
        if not isinstance(engine, InFlightEngine):
            return Failure("engine", "this server's engine takes new weights between two requests only")

        def between() -> More | None:
            nonlocal end
            if self._stopping or batch.abandoned:
                end = _STOPPING
                return None
            prompts, seeds = list[np.ndarray](), list[Sequence[int]]()
            while (item := self._joins(batch)) is not None:
                if isinstance(item, Job):
                    more = batch.add(item)
                    prompts += more[0]
                    seeds += more[1]
                    continue
                if self.weights is not None and item.weights.id.policy_version < self.weights.policy_version:
                    item.done.set_exception(OtherWeightsError(f"{self.weights} are newer than {item.weights.id}"))
                    continue
                self._load(item)
                if self.weights is None:
                    end = Failure("engine", "a refit failed half-way")
                    return None
            return prompts, seeds

        in_flight = InFlight(between, request.refit == "recomputes_kv", batch.prompt_tokens)
        engine.generate_in_flight(batch.prompts, request.sampling, batch.seeds, on_finish, in_flight)
        return end

    def _joins(self, batch: Batch) -> Job | Load | None:
        """What waits first and can be done in the midst of a batch; None: nothing waits, or what does has to wait."""
        with self._changed:
            while self._queue:
                first = self._queue[0]
                if isinstance(first, Sleep) or (isinstance(first, Job) and not batch.takes(first)):
                    break
                self._queue.popleft()
                if isinstance(first, Load) or first.request.weights == self.weights:
                    return first
                self.outstanding -= first.left
                first.emit(self._other_weights())
        return None

    def _other_weights(self) -> Failure:
        return Failure("other_weights", f"this server has {self.weights or 'no whole weights'} now")


_STOPPING = Failure("stopping", "the server is stopping")


def _record(jobs: Sequence[Job]) -> None:
    """Record a batch from now on for its first traced request; the others get how long they waited."""
    for job in [job for job in jobs if job.traced][::-1]:
        job.recorder = spans.start("", traced_servers.LIMIT)
        job.recorder.add("waits", job.received, time.perf_counter_ns(), "server", track="queue")


def _drop(item: Item) -> None:
    item.emit(_STOPPING) if isinstance(item, Job) else item.done.cancel()
