"""The classes of TensorRT-LLM that the adapter calls, as protocols: the library is not there at type checking.

``contract.py`` says the same as data, which ``check.py`` compares with a real package.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol


class Logprob(Protocol):
    """One log-prob of a token."""

    logprob: float


class CompletionOutput(Protocol):
    """One completion."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Logprob]] | None
    """For each token of the completion the log-probs of some tokens, by token id."""
    finish_reason: str | None


class RequestOutput(Protocol):
    """The answer to one request."""

    outputs: Sequence[CompletionOutput]


class AsyncLLM(Protocol):
    """An engine."""

    async def setup_async(self) -> object: ...
    def generate_async(self, inputs: list[int], sampling_params: object) -> Awaitable[RequestOutput]: ...
    async def release(self, tags: list[str]) -> object: ...
    async def resume(self, tags: list[str]) -> object: ...
    async def update_weights(self, weights: dict[str, str] | None) -> object: ...
    async def collective_rpc(self, method: str) -> list[Any]: ...
    def shutdown(self) -> None: ...


class Library(Protocol):
    """What is called of the package; all take keyword arguments."""

    def AsyncLLM(self, **arguments: Any) -> AsyncLLM: ...
    def SamplingParams(self, **arguments: Any) -> object: ...
    def KvCacheConfig(self, **arguments: Any) -> object: ...
