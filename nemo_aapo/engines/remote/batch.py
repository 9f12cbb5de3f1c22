"""What a rollout server is asked to generate, what it answers, and the requests that run together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nemo_aapo.engines.base import More
from nemo_aapo.engines.remote.wire import GenerateRequest
from nemo_aapo.engines.weights import Weights
from nemo_aapo.trace import spans
from nemo_aapo.types import Completion

Reason = Literal["request", "other_weights", "not_finite", "engine", "stopping"]


@dataclass(frozen=True)
class Failure:
    """Why a request is not answered, or not to its end."""

    reason: Reason
    """The kind of failure, for the client's program."""
    message: str
    """The same for people."""


Answer = tuple[int, int, Completion] | Failure | None
"""One answer to a request: (i, j, completion j of prompt i); then, as the last one, None or a failure."""


@dataclass(eq=False)
class Job:
    """A request to generate, and where its answers go."""

    request: GenerateRequest
    emit: Callable[[Answer], None]
    """Takes each answer; called from the worker's thread."""
    traced: bool = False
    """Whether its sender records a trace."""
    received: int = field(default_factory=time.perf_counter_ns)
    """When it came, nanoseconds."""
    recorder: spans.Recorder | None = None
    """At the end, what was done for it, if it was traced; of a batch the first such request has all of it."""
    cancelled: bool = False
    """True once nobody waits for the answers any more; whoever asked sets it."""
    left: int = field(init=False)
    """Completions that are not generated yet."""

    def __post_init__(self) -> None:
        self.left = self.request.sequences

    def goes_with(self, other: Job) -> bool:
        """Whether both can run as one batch."""
        own, its = self.request, other.request
        return (own.weights, own.sampling, own.refit) == (its.weights, its.sampling, its.refit)


class Batch:
    """Requests that run together, as one call to the engine; in flight more of them come and others end meanwhile."""

    def __init__(self, jobs: Sequence[Job], prompt_tokens: int) -> None:
        """Args: prompt_tokens: room for prompts that come later; more if one of these is longer."""
        self.request = jobs[0].request
        self.jobs: list[Job] = []  # those that have not ended
        self.prompts: list[np.ndarray] = []
        self.seeds: list[Sequence[int]] = []
        self._owners: dict[int, tuple[Job, int]] = {}  # of each prompt whose request has not ended
        self._count = 0  # prompts so far
        for job in jobs:
            prompts, seeds = self.add(job)
            self.prompts += prompts
            self.seeds += seeds
        self.in_flight = self.request.refit != "waits"
        self.prompt_tokens = max(prompt_tokens, *map(len, self.prompts), 0)

    @property
    def left(self) -> int:
        """Completions that are not generated yet."""
        return sum(job.left for job in self.jobs)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of those that have not ended."""
        return bool(self.jobs) and all(job.cancelled for job in self.jobs)

    def takes(self, job: Job) -> bool:
        """Whether a request can join it now, but for the weights that it asks for."""
        own, its = self.request, job.request
        alike = (own.sampling, own.refit) == (its.sampling, its.refit)
        return alike and all(len(prompt) <= self.prompt_tokens for prompt in its.prompts)

    def add(self, job: Job) -> More:
        """Take up a request; its prompts and seeds, which are numbered behind those so far."""
        self.jobs.append(job)
        for i in range(len(job.request.prompts)):
            self._owners[self._count + i] = job, i
        self._count += len(job.request.prompts)
        return list(job.request.prompts), list(job.request.seeds)

    def hand_over(self, number: int, j: int, completion: Completion) -> None:
        """Answer with a completion: j of the prompt with this number. In flight, a request ends with its last one."""
        job, i = self._owners[number]
        job.left -= 1
        if not job.cancelled:
            job.emit((i, j, completion))
        if self.in_flight and not job.left:
            self.jobs.remove(job)
            for other in range(number - i, number - i + len(job.request.prompts)):
                del self._owners[other]
            job.emit(None)

    def end(self, failure: Failure | None) -> None:
        """Nothing is generated any more."""
        for job in self.jobs:
            job.emit(failure)


@dataclass(eq=False)
class Load:
    """A refit, and the future that tells its end."""

    weights: Weights
    done: Future[None] = field(default_factory=Future)


@dataclass(eq=False)
class Sleep:
    """A request to give back the devices' memory, and the future that tells when that is done."""

    done: Future[None] = field(default_factory=Future)


Item = Job | Load | Sleep
"""What waits for its turn at the engine."""
