"""Scores completions, in worker processes that are killed when an item takes too long.

A verifier that meets ``9^{9^{9^9}}``, or a user's own function, may run for ever, eat all memory or crash, and no
signal or thread stops it for sure. A process can be killed.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from nemo_aapo.rewards import reward_config
from nemo_aapo.rewards.base import Reward, score_parts
from nemo_aapo.rewards.definition import reward_definition
from nemo_aapo.rewards.workers.channel import encode_item
from nemo_aapo.rewards.workers.pool import START_TIMEOUT_S, Failure, Reply, WorkerPool
from nemo_aapo.run.stop import heed
from nemo_aapo.types import Completion, Prompt

logger = logging.getLogger(__name__)

HEED_S = 1.0
"""Pause before whoever waits for scores looks again whether a stop was asked for."""
_LOGGED_FAILURES = 3
_SHORT_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,14}")


@dataclass(frozen=True, slots=True)
class RewardResult:
    """What the rewards say of one completion."""

    score: float
    """The weighted sum; NaN if the item failed: a reward with a weight other than 0 has no value."""
    parts: dict[str, float]
    """Each reward's unweighted value by name; NaN where it has none."""
    failure: Failure | None = None
    """``"timeout"``: over the time limit. ``"error"``: a reward raised, crashed, ran out of memory, was not finite."""
    detail: str = ""
    """What went wrong, in one line; also of a reward that only reports, without which the item is scored."""


@dataclass(slots=True)
class RewardStats:
    """Counts of collected completions since the runner was made."""

    scored: int = 0
    """All of them, failed ones included."""
    timeouts: int = 0
    errors: int = 0


class RewardRunner:
    """Scores completions by weighted rewards: ``submit`` while generation goes on, ``collect`` when it is done.

    Results depend on the items alone, not on which worker is done first. Any thread may submit and collect; a reward in
    this process is called by one at a time. Use it as a context manager, or ``close`` it.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[Reward, float]],
        workers: int,
        timeout_s: float,
        memory_gib: float = 4.0,
    ) -> None:
        """Start the workers and wait until all are ready.

        Args:
            rewards: (reward, weight); a weight of 0 only reports the reward.
            workers: worker processes. 0 scores in this process, which only rewards that always end may
                (``Reward.in_process``).
            timeout_s: seconds of wall clock for one completion, all its rewards together.
            memory_gib: address space of one worker, GiB; beyond it an item fails with MemoryError.

        Raises:
            ValueError: impossible arguments.
            RewardError: a worker can't load its rewards.
        """
        self._rewards = [reward for reward, _ in rewards]
        self._weights = [float(weight) for _, weight in rewards]
        _check_arguments(self._rewards, self._weights, workers)
        if not (timeout_s > 0 and memory_gib > 0):
            raise ValueError(f"timeout_s ({timeout_s}) and memory_gib ({memory_gib}) must be above 0")
        self._workers = workers
        self._timeout_s = timeout_s
        self._pending: dict[Hashable, Future[Reply]] = {}
        self._in_process = threading.Lock()
        self.stats = RewardStats()
        self.pool: WorkerPool | None = None
        """The worker processes; None if there are none."""
        if workers:
            configs = [reward_config(reward) for reward in self._rewards]
            self.pool = WorkerPool({"rewards": configs, "memory_gib": memory_gib}, workers, timeout_s)

    def submit(self, index: Hashable, prompt: Prompt, text: str, completion: Completion) -> None:
        """Hand over one completion, whose result is collected under ``index``.

        Raises:
            ValueError: a completion of that index is not collected yet.
            RewardError: the runner is closed.
        """
        if index in self._pending:
            raise ValueError(f"completion {index} is submitted already")
        if self.pool is not None:
            self._pending[index] = self.pool.request(encode_item(prompt, text, completion))
            return
        scored: Future[Reply] = Future()
        with self._in_process:
            scored.set_result(Reply(*score_parts(self._rewards, prompt, text, completion)))
        self._pending[index] = scored

    def collect(
        self, indices: Collection[Hashable] | None = None, timeout_s: float | None = None
    ) -> dict[Hashable, RewardResult]:
        """The results of completions that were submitted and not collected yet, in the order of submission.

        Args:
            indices: of those that are wanted; the others stay. None: of all.
            timeout_s: seconds to wait; by default what it takes if the worker of every item that was submitted and has
                not ended, wanted or not, has to be killed and replaced: workers take them in order.

        Raises:
            TimeoutError: some are not scored by then.
            RewardError: a killed worker could not be replaced.
            Interrupted: a stop broke the waiting off; they can be collected yet.
        """
        wanted = list(self._pending) if indices is None else [index for index in indices if index in self._pending]
        pending = {index: self._pending[index] for index in wanted}
        if timeout_s is None:
            queued = sum(not future.done() for future in list(self._pending.values()))
            timeout_s = math.ceil(queued / max(self._workers, 1)) * (self._timeout_s + START_TIMEOUT_S)
        late = _wait(pending.values(), timeout_s)
        if late:
            raise TimeoutError(f"{len(late)} of {len(pending)} completions were not scored within {timeout_s:g} s")
        for index in pending:
            del self._pending[index]
        results = {index: self._result(future.result()) for index, future in pending.items()}
        self._count(results)
        return results

    def definition(self) -> list[dict[str, Any]]:
        """All that scores depend on besides the completion: each reward with its weight."""
        weighted = zip(self._rewards, self._weights, strict=True)
        return [{**reward_definition(reward), "weight": weight} for reward, weight in weighted]

    def check_answer(self, answer: str) -> None:
        """Raise ValueError if a reward can't work with this gold answer, or needs more than the limit to find out."""
        if _SHORT_INTEGER.fullmatch(answer) and all(map(_takes_integers, self._rewards)):
            return
        if self.pool is None:
            for reward in self._rewards:
                reward.check_answer(answer)
            return
        heed("the check of the gold answers")
        reply = self.pool.request({"check_answer": answer}).result(self._timeout_s + START_TIMEOUT_S)
        if reply.failure is not None:
            raise ValueError(reply.detail)

    def close(self) -> None:
        """Kill the workers. Completions that were not collected are lost."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _result(self, reply: Reply) -> RewardResult:
        values = [math.nan if part is None else part for part in reply.parts or [None] * len(self._rewards)]
        parts = {reward.name: value for reward, value in zip(self._rewards, values, strict=True)}
        # A weight of 0 only reports: a reward that fails leaves the sum of the others as it is.
        score = float(sum(weight * value for weight, value in zip(self._weights, values, strict=True) if weight))
        if reply.failure is None and math.isfinite(score):
            return RewardResult(score, parts, None, reply.detail)
        return RewardResult(math.nan, parts, reply.failure or "error", reply.detail or f"the sum is {score}: {parts}")

    def _count(self, results: Mapping[Hashable, RewardResult]) -> None:
        failed = {index: result for index, result in results.items() if result.failure}
        timeouts = sum(result.failure == "timeout" for result in failed.values())
        self.stats.scored += len(results)
        self.stats.timeouts += timeouts
        self.stats.errors += len(failed) - timeouts
        told = [(index, result.detail) for index, result in results.items() if result.detail]
        for index, detail in told[:_LOGGED_FAILURES]:
            logger.warning("completion %s: %s", index, detail)
        if len(failed) > _LOGGED_FAILURES:
            logger.warning("%d of %d completions could not be scored", len(failed), len(results))


def _wait(futures: Iterable[Future[Reply]], timeout_s: float) -> Collection[Future[Reply]]:
    """Wait for all of them; those that have not ended within the time."""
    end, late = time.monotonic() + timeout_s, {future for future in futures if not future.done()}
    while late and (left := end - time.monotonic()) > 0:
        late = wait(late, min(left, HEED_S)).not_done
        if late:
            heed(f"the rewards of {len(late)} completions")
    return late


def _takes_integers(reward: Reward) -> bool:
    checks_nothing = type(reward).check_answer is Reward.check_answer
    return checks_nothing or getattr(reward, "takes_integers", False)  # one of a user's own may not say


def _check_arguments(rewards: Sequence[Reward], weights: Sequence[float], workers: int) -> None:
    names = [reward.name for reward in rewards]
    if not names:
        raise ValueError("at least one reward is needed")
    if len(set(names)) < len(names):
        raise ValueError(f"each reward needs a name of its own, got {names}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights ({weights}) must be finite")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, not {workers}")
    unsafe = [reward.name for reward in rewards if not reward.in_process]
    if workers == 0 and unsafe:
        raise ValueError(
            f"workers is 0, but {', '.join(unsafe)} may never end and must run in a process that can be killed; "
            "set workers to 1 or more"
        )
