"""The client side of rollout servers: who gets which prompts, and what happens when a server fails.

No completion is lost or counted twice. Each attempt owns the completions that it asks for, and hands over each as it
comes. Once an attempt has failed, its connection is closed, so that a late answer reaches nobody, and the completions
that are left go to another server. Seeds decide tokens: it does not matter which server generates a completion, or
whether one did before.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import aiohttp
import numpy as np

from nemo_aapo.engines.base import OnFinish
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, read_servers
from nemo_aapo.errors import RunError, ServerError, WeightsRefusedError, WireError
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.buckets import buckets

T = TypeVar("T")

PROBE_S = 10.0
"""A server that does not answer ``ready`` within this is hanging."""
POLL_S = 0.25
"""Pause before servers that were not usable are asked again."""
FORGIVE_S = 60.0
"""A server that failed is asked again after this, or when nobody else is left."""
REQUEST_TOKENS = 1 << 20
"""Prompt tokens of one request, about 7 MB of JSON: more go as several requests, which the server puts together."""
_PROBE = aiohttp.ClientTimeout(total=PROBE_S)


@dataclass(eq=False)
class Work:
    """The completions of one prompt that are still to be generated.

    Example: ``Work(prompt=3, left=[0, 2], tokens=2130)`` stands for completions 0 and 2 of prompt 3.
    """

    prompt: int
    """Index of the prompt in ``Call.prompts``."""
    left: list[int]
    """Numbers j of the completions that no server has sent yet."""
    tokens: int
    """The most tokens that they can cost: the prompt once, each completion to its limit."""
    reasons: list[str] = field(default_factory=list)
    """Why each attempt so far has failed."""


@dataclass(frozen=True)
class Call:
    """What ``Fleet.generate`` is asked for, and where the answers go."""

    weights: wire.Weights
    """The weights to generate with."""
    prompts: Sequence[np.ndarray]
    """int32 [P_i] token ids each."""
    sampling: SamplingSpec
    seeds: Sequence[Sequence[int]]
    """``seeds[i][j]`` names the random stream of completion j of prompt i."""
    on_finish: OnFinish


class Fleet:
    """All servers of one directory. Its methods block; at most one runs at a time."""

    def __init__(
        self,
        directory: str | Path,
        *,
        servers: int,
        min_servers: int = 1,
        wait_s: float,
        timeout_s: float,
        retries: int,
        log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """
        Args:
            directory: the servers' directory.
            servers: how many must have come at the first call.
            min_servers: how many must be left at later ones.
            wait_s: how long to wait for them.
            timeout_s: the longest silence of a server that has work.
            retries: how often a prompt is sent again.
            log: told once of each server that is left out.

        Raises:
            ConfigError: directory or token are open to others.
        """
        self.directory = open_directory(directory)
        self.servers, self.min_servers = servers, min_servers
        self.wait_s, self.timeout_s, self.retries = wait_s, timeout_s, retries
        self.whole_of: Callable[[wire.Weights], wire.Weights | None] = lambda weights: None
        """Weights in another form, for a server that can't use the first one; None: there is none."""
        self._log = log
        self._complete = False
        self._failed: dict[str, tuple[float, str]] = {}  # by instance: when and why

    # ------------------------------------------------------------------ what the engine calls

    def prepare(self, weights: wire.Weights) -> None:
        """Have all servers serve these weights.

        Raises:
            RunError: too few do in time; names each server and why.
        """
        asyncio.run(self.with_session(lambda session: self._usable(session, weights)))

    def generate(self, call: Call) -> None:
        """Have everything generated; ``call.on_finish`` is told of each completion exactly once.

        Raises:
            RunError: too few servers are left, or a prompt has failed too often; names each server and why.
            FloatingPointError: a server's weights give log-probs that are not finite.
        """
        asyncio.run(self.with_session(lambda session: self._generate(session, call)))

    async def with_session(self, action: Callable[[aiohttp.ClientSession], Awaitable[T]]) -> T:
        """The action's result, which may talk to the servers."""
        headers = {"Authorization": f"Bearer {open_token(self.directory)}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S, sock_read=self.timeout_s)
        # trust_env stays off: no proxy has a part in this, and the token goes to the servers alone
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            return await action(session)

    # ------------------------------------------------------------------ which servers

    async def _usable(self, session: aiohttp.ClientSession, weights: wire.Weights) -> list[ServerRecord]:
        """The servers that have these weights, after those that had others were told to load them."""
        end = time.monotonic() + self.wait_s
        while True:
            records, now = read_servers(self.directory), time.monotonic()
            asked = [r for r in records if now - self._failed.get(r.instance, (-FORGIVE_S, ""))[0] >= FORGIVE_S]
            asked = asked or records
            problems = await asyncio.gather(*(self._problem(session, record, weights) for record in asked))
            usable = [record for record, problem in zip(asked, problems, strict=True) if problem is None]
            if self.are_enough(len(usable)):
                return usable
            if time.monotonic() >= end:
                reasons = {record.index: problem for record, problem in zip(asked, problems, strict=True)}
                raise RunError(self.too_few(records, reasons, len(usable)))
            await asyncio.sleep(POLL_S)

    def are_enough(self, servers: int, settled: bool = True) -> bool:
        """Whether so many servers are: all at first; once they were there (and ``settled``), the least number."""
        enough = servers >= (self.min_servers if self._complete else self.servers)
        self._complete |= enough and settled
        return enough

    async def _problem(self, session: aiohttp.ClientSession, server: ServerRecord, weights: wire.Weights) -> str | None:
        """Why a server can't be used now; None: it serves these weights."""
        try:
            has = await self.served(session, server)
            if has == "starting":
                return "is still loading its model"
            if has != weights.id:
                await self._update(session, server, weights)
        except ServerError as error:
            self.fail(server, str(error))
            return str(error)
        self._failed.pop(server.instance, None)
        return None

    async def served(
        self, session: aiohttp.ClientSession, server: ServerRecord
    ) -> wire.WeightsId | Literal["starting"] | None:
        """What a server serves now; None: a refit has failed half-way, and a whole one mends it."""
        with _failures_named(PROBE_S):
            async with session.get(f"{server.address}{wire.API}/ready", timeout=_PROBE) as response:
                answer = wire.load_object(await response.read())
                if response.status == 503:
                    return "starting" if answer.get("reason") == "starting" else None
                if response.status != 200:
                    raise ServerError(_complaint(response, answer))
                return wire.decode_weights_id(answer)

    async def _update(self, session: aiohttp.ClientSession, server: ServerRecord, weights: wire.Weights) -> None:
        if weights.sent:
            raise ServerError("has other weights; the trainer's ranks send it theirs at the next refit")
        try:
            await self.post_update(session, server, weights)
        except WeightsRefusedError:
            if (whole := await asyncio.to_thread(self.whole_of, weights)) is None:
                raise
            await self.post_update(session, server, whole)

    async def post_update(self, session: aiohttp.ClientSession, server: ServerRecord, weights: wire.Weights) -> None:
        """Have a server take weights, and wait until it serves them.

        Raises:
            ServerError: why it does not; a ``WeightsRefusedError`` where that is due to the weights.
        """
        url, body = f"{server.address}{wire.API}/update_weights", wire.encode_weights(weights)
        with _failures_named(self.timeout_s):
            async with session.post(url, data=body) as response:
                answer = wire.load_object(await response.read())
                if response.status != 200:
                    raise (WeightsRefusedError if response.status == 422 else ServerError)(_complaint(response, answer))
                if wire.decode_weights_id(answer) != weights.id:
                    raise ServerError(f"was told to load {weights.id} and loaded {answer}")

    def fail(self, server: ServerRecord, reason: str) -> None:
        """Note that a server has failed."""
        if server.instance not in self._failed:
            self._log(f"rollout server {server.index} ({server.address}) is left out: {reason}")
        self._failed[server.instance] = (time.monotonic(), reason)

    def too_few(self, records: Sequence[ServerRecord], reasons: dict[int, str | None], usable: int) -> str:
        """The message that so many usable servers are not enough."""
        lines = [f"none has announced itself in {self.directory}"]
        if records:
            now = {r.index: reasons.get(r.index, self._failed.get(r.instance, (0, ""))[1]) or "ready" for r in records}
            lines = [f"server {r.index} ({r.address}): {now[r.index]}" for r in records]
        needed = f"min_servers={self.min_servers}" if self._complete else f"servers={self.servers}"
        wanted = f"rollout.remote.{needed} are needed"
        return f"after {self.wait_s:g} s (rollout.remote.wait_s) {usable} rollout servers are usable, {wanted}:\n  " + (
            "\n  ".join(lines)
        )

    # ------------------------------------------------------------------ generate

    async def _generate(self, session: aiohttp.ClientSession, call: Call) -> None:
        waiting = [
            Work(i, list(range(len(row))), len(prompt) + len(row) * call.sampling.max_new_tokens)
            for i, (prompt, row) in enumerate(zip(call.prompts, call.seeds, strict=True))
            if row
        ]
        running: dict[asyncio.Task[None], tuple[ServerRecord, list[Work]]] = {}
        servers = await self._usable(session, call.weights)
        try:
            while waiting or running:
                if waiting:
                    if len(servers) < self.min_servers:
                        servers = await self._usable(session, call.weights)
                    busy = [
                        sum(w.tokens for s, works in running.values() if s is server for w in works)
                        for server in servers
                    ]
                    for server, works in zip(servers, distribute(waiting, busy), strict=True):
                        for part in _requests(works, call.prompts):
                            task = asyncio.create_task(self._attempt(session, server, part, call))
                            running[task] = server, part
                    waiting = []
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    server, works = running.pop(task)
                    try:
                        task.result()
                    except ServerError as error:
                        self.fail(server, str(error))
                        servers = [other for other in servers if other is not server]
                        waiting += self._again(works, f"server {server.index} ({server.address}): {error}")
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _again(self, works: Sequence[Work], reason: str) -> list[Work]:
        """The work that a failed attempt has left over, to be sent again."""
        left = [work for work in works if work.left]
        for work in left:
            work.reasons.append(reason)
            if len(work.reasons) > self.retries:
                raise RunError(
                    f"prompt {work.prompt} of this rank's shard was sent to rollout servers {len(work.reasons)} times "
                    f"(rollout.remote.retries={self.retries}) and failed each time:\n  " + "\n  ".join(work.reasons)
                )
        return left

    async def _attempt(
        self, session: aiohttp.ClientSession, server: ServerRecord, works: Sequence[Work], call: Call
    ) -> None:
        """Have one server generate what is left of some prompts; what it has sent before it fails counts."""
        asked = [tuple(work.left) for work in works]
        request = wire.GenerateRequest(
            call.weights.id,
            call.sampling,
            [call.prompts[work.prompt] for work in works],
            [[call.seeds[work.prompt][j] for j in numbers] for work, numbers in zip(works, asked, strict=True)],
        )
        async for k, n, completion in self._answers(session, server, request):
            if not (0 <= k < len(works) and 0 <= n < len(asked[k]) and asked[k][n] in works[k].left):
                raise ServerError(f"sent completion {n} of prompt {k}, which it was not asked for, or twice")
            if completion.policy_version != call.weights.id.policy_version:
                raise ServerError(
                    f"answered with policy version {completion.policy_version} instead of {call.weights.id}"
                )
            if completion.routes is not None and len(completion.routes.prompt) != len(request.prompts[k]):
                raise ServerError(f"sent routes of {len(completion.routes.prompt)} tokens for prompt {k}")
            works[k].left.remove(asked[k][n])
            call.on_finish(works[k].prompt, asked[k][n], completion)
        if any(work.left for work in works):
            raise ServerError("left out completions that it was asked for")

    async def _answers(
        self, session: aiohttp.ClientSession, server: ServerRecord, request: wire.GenerateRequest
    ) -> AsyncIterator[tuple[int, int, Completion]]:
        url, body = f"{server.address}{wire.API}/generate", wire.encode_request(request)
        with _failures_named(self.timeout_s):
            async with session.post(url, data=body) as response:
                if response.status != 200:
                    _raise(_complaint(response, answer := wire.load_object(await response.read())), answer)
                messages, prompts = wire.MessageReader(), dict[int, np.ndarray]()
                async for data in response.content.iter_any():
                    for message, binary in messages.read(data):
                        if "error" in message:
                            _raise(message["error"], message)
                        if "done" in message:
                            return
                        yield wire.decode_completion(message, binary, prompts)
        raise ServerError("the connection ended before the answer did")


def distribute(works: Sequence[Work], busy: Sequence[int]) -> list[list[Work]]:
    """Give each server its part of the work: a prompt goes to the server with the fewest tokens so far.

    Prompts with the most completions are given away first; among equals the order of the prompts counts, which is
    longest expected first. Each server's part is in the order of the prompts, so that a server alone is asked exactly
    what an engine in process would be.

    Args:
        busy: tokens that each server has to generate already.
    """
    parts: list[list[Work]] = [[] for _ in busy]
    tokens = list(busy)
    for work in sorted(works, key=lambda work: (-len(work.left), work.prompt)):
        least = tokens.index(min(tokens))
        parts[least].append(work)
        tokens[least] += work.tokens
    return [sorted(part, key=lambda work: work.prompt) for part in parts]


def _requests(works: Sequence[Work], prompts: Sequence[np.ndarray]) -> Iterator[list[Work]]:
    """One server's part, cut into requests of a bounded size."""
    return buckets(works, lambda work: len(prompts[work.prompt]), REQUEST_TOKENS)


def _complaint(response: aiohttp.ClientResponse, answer: dict[str, Any]) -> str:
    return f"HTTP {response.status}: {answer.get('error') or response.reason}"


def _raise(message: str, answer: dict[str, Any]) -> NoReturn:
    """A failed answer of ``generate``; weights that are not finite are the policy's fault and not the server's."""
    if answer.get("reason") == "not_finite":
        raise FloatingPointError(answer["error"])
    raise ServerError(message)


@contextmanager
def _failures_named(timeout_s: float) -> Iterator[None]:
    """Inside, what can go wrong with a connection becomes a ``ServerError`` that says it in words."""
    try:
        yield
    except asyncio.TimeoutError:
        raise ServerError(f"said nothing for {timeout_s:g} s") from None
    except aiohttp.ClientConnectorError as error:
        raise ServerError(f"can't be reached ({error.strerror or error})") from None
    except aiohttp.ClientError as error:
        raise ServerError(f"the connection broke ({error or type(error).__name__})") from None
    except WireError as error:
        raise ServerError(f"its answer can't be read: {error}") from None
