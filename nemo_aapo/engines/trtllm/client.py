"""The one user of an ``AsyncLLM``: an event loop in a thread of its own, and a deadline on every wait.

The library lives in that thread. It is asynchronous, the learner is not; and Ray, started in the main thread, would
take over the signal handlers that make a run stop cleanly.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

from nemo_aapo.engines.trtllm.library import AsyncLLM, CompletionOutput, Library, RequestOutput
from nemo_aapo.errors import RunError

T = TypeVar("T")
Name = TypeVar("Name")
Request = tuple[Name, list[int], dict[str, Any]]
"""(a name of the caller's choice, the prompt's token ids, keyword arguments of ``SamplingParams``)"""

CLOSE_S = 60.0
"""Seconds to wait for the engine's end: the library gives its workers 30."""
LOOK_S = 0.5
"""While it waits, the client says so this often."""


class EngineClient:
    """Synchronous calls of one engine. Every failure of the library comes out as a ``RunError`` that names the call."""

    def __init__(
        self, library: Library, arguments: dict[str, Any], timeout_s: float, waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Start the engine and wait until it is ready.

        Args:
            library: TensorRT-LLM's classes.
            arguments: of ``AsyncLLM``.
            timeout_s: the longest wait for any one answer, the start included.
            waiting: called every ``LOOK_S`` of any wait, and after each completion, in the caller's thread.
        """
        self._library, self._timeout_s, self._waiting = library, timeout_s, waiting
        self._started: AsyncLLM | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trtllm", daemon=True)
        self._thread.start()
        try:
            self._call("start", self._start(arguments))
        except RunError:
            self.close()
            raise

    async def _start(self, arguments: dict[str, Any]) -> None:
        self._started = self._library.engine(**arguments)
        await self._llm.setup_async()

    @property
    def _llm(self) -> AsyncLLM:
        if self._started is None:
            raise RunError("the TensorRT-LLM engine is not started, or it is closed")
        return self._started

    def release(self, tags: Sequence[str]) -> None:
        """Give device memory back."""
        self._call("release", self._llm.release(tags=list(tags)))

    def resume(self, tags: Sequence[str]) -> None:
        """Take it again."""
        self._call("resume", self._llm.resume(tags=list(tags)))

    def update_weights(self, payloads: dict[str, str] | None) -> None:
        """Hand over one bucket; None after the last: post-load hooks run, and the prefix cache is emptied."""
        self._call("update_weights", self._llm.update_weights(weights=payloads))

    def ask_workers(self, method: str) -> list[Any]:
        """Call a method of every worker; what each returned."""
        return self._call(method, self._llm.collective_rpc(method=method))

    def complete(self, requests: Sequence[Request[Name]]) -> Generator[tuple[Name, CompletionOutput], None, None]:
        """Generate completions, all at once.

        Yields:
            The request's name and its ``CompletionOutput``, each the moment it is done.

        Raises:
            RunError: a request failed, or none ended within the deadline. The others are cancelled.
        """
        finished: queue.SimpleQueue[tuple[Name, CompletionOutput] | None] = queue.SimpleQueue()
        under_way: list[RequestOutput] = []

        async def generate(name: Name, prompt: list[int], arguments: dict[str, Any]) -> None:
            sampling = self._library.sampling_params(**arguments)
            request = self._llm.generate_async(inputs=prompt, sampling_params=sampling)
            under_way.append(request)
            output = await request
            under_way.remove(request)
            finished.put((name, output.outputs[0]))

        async def generate_all() -> None:
            # Trap: n completions are n requests of one, which stream, finish and are seeded one by one.
            await asyncio.gather(*(generate(*request) for request in requests))

        future = asyncio.run_coroutine_threadsafe(generate_all(), self._loop)
        future.add_done_callback(lambda _: finished.put(None))
        try:
            for _ in requests:
                item = self._next(finished)
                if item is None:  # all is over, and not all have come: one of them failed
                    raise _failed("generate_async", future.exception())
                yield item
                self._waiting()
        finally:
            future.cancel()
            with contextlib.suppress(RunError):  # what can't be ended runs on to its own end: a waste, no error
                self._wait("abort", self._abort(under_way), min(self._timeout_s, CLOSE_S))

    def _next(self, finished: queue.SimpleQueue[T]) -> T:
        """The next completion to end, or None; said to be waiting for meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        while (remaining := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return finished.get(timeout=min(LOOK_S, remaining))
            self._waiting()
        raise RunError(f"TensorRT-LLM finished no completion within {self._timeout_s:g} s")

    async def _abort(self, under_way: list[RequestOutput]) -> None:
        """End these requests: awaits that are given up leave them in the engine, whose GPUs the learner wants."""
        if not under_way:
            return
        if "pause_generation" in self._library.contract.methods:  # one call, instead of one through Ray for each
            await self._llm.pause_generation()
            await self._llm.resume_generation()
            return
        await asyncio.gather(*(self._loop.run_in_executor(None, request.abort) for request in tuple(under_way)))

    def close(self) -> None:
        """End the engine and its thread. May be called again."""
        if not self._loop.is_running():
            return
        llm, self._started = self._started, None
        try:
            if llm is not None:
                self._wait("shutdown", self._shutdown(llm), CLOSE_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)

    async def _shutdown(self, llm: AsyncLLM) -> None:
        await self._loop.run_in_executor(None, llm.shutdown)

    def _call(self, what: str, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._wait(what, coroutine, self._timeout_s)

    def _wait(self, what: str, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        deadline = time.monotonic() + timeout_s
        while not future.done() and (remaining := deadline - time.monotonic()) > 0:
            concurrent.futures.wait([future], min(LOOK_S, remaining))
            self._waiting()
        if not future.done():
            future.cancel()
            raise RunError(f"TensorRT-LLM did not answer to {what} within {timeout_s:g} s")
        try:
            return future.result()
        except Exception as error:
            raise _failed(what, error) from error


def _failed(what: str, error: BaseException | None) -> RunError:
    return RunError(f"TensorRT-LLM failed in {what}: {type(error).__name__}: {error}")
