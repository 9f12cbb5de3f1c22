"""The state of one worker of the stand-in for TensorRT-LLM (``fake_trtllm.py``), and the tiny model that it holds."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from nemo_aapo.engines.trtllm.contract import KV_CACHE_TAG

VOCAB = 24
ABORT_S = 0.03
"""An aborted request holds its blocks until the executor's next iterations."""
TABLE = "model.table.weight"
"""The model's weights: row t holds the logits after token t."""


class LifeCycleError(Exception):
    """A call that the library would answer with a crash, a hang or wrong tokens."""


def table(seed: int = 0) -> torch.Tensor:
    """float32 [VOCAB, VOCAB], a model's weights."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


class Executor:
    """The state of one worker: what memory it has, what weights, what is in its prefix cache."""

    def __init__(self, tags: Collection[str]) -> None:
        """Args: tags: of all memory that can be released."""
        self.weights = {TABLE: table()}
        self.tags, self.present = set(tags), set(tags)
        self.live: dict[asyncio.Task[Any] | None, tuple[int, ...]] = {}
        """The prompts of requests under way, by their tasks."""
        self.unfinished_update = False
        self.prefixes: set[tuple[int, ...]] = set()
        self.stale: set[tuple[int, ...]] = set()

    @property
    def has_weights(self) -> bool:
        """All memory is there but for the KV cache, which may be."""
        return self.tags - {KV_CACHE_TAG} <= self.present

    @contextlib.contextmanager
    def running(self, prompt: list[int], task: asyncio.Task[Any] | None = None) -> Iterator[None]:
        """Inside, a request is under way; at its end its blocks stay in the prefix cache."""
        self.require(self.present == self.tags, "generate while memory is released")
        self.require(not self.unfinished_update, "generate before finalize")
        self.require(tuple(prompt) not in self.stale, "generate from a prefix whose keys and values are gone")
        self.live[task] = tuple(prompt)
        try:
            yield
        finally:
            self._end(task)

    def _end(self, task: asyncio.Task[Any] | None) -> None:
        if task in self.live:
            self.prefixes.add(self.live.pop(task))

    @contextlib.contextmanager
    def control_action(self) -> Iterator[None]:
        """Inside, what was aborted has ended."""
        for task in [task for task in self.live if task is not None and task.cancelling()]:
            self._end(task)
        yield

    def reset_prefix_cache(self) -> None:
        self.require(not self.live, "reset_prefix_cache while requests are under way")
        self.prefixes.clear()
        self.stale.clear()

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise LifeCycleError(message)


def control_action_decorator(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def controlled(self: Any, *args: Any) -> None:
        with self.engine.control_action():
            method(self, *args)

    return controlled
