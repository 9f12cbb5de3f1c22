"""The client side of rollout servers: who gets which prompts, and what happens when a server fails.

No completion is lost or counted twice. Each attempt owns the completions that it asks for, and hands over each as it
comes. Once an attempt has failed, its connection is closed, so that a late answer reaches nobody, and the completions
that are left go to another server. Seeds decide tokens: it does not matter which server generates a completion, or
whether one did before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import aiohttp
import numpy as np

from nemo_aapo.engines.base import OnFinish
from nemo_aapo.engines.messages import load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord
from nemo_aapo.engines.remote.queues import Ticket
from nemo_aapo.engines.remote.servers import TURN_S, Servers, complaint, failures_named
from nemo_aapo.errors import OtherWeightsError, RequestError, RunError, ServerError
from nemo_aapo.trace import servers as traced_servers
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.buckets import buckets

REQUEST_TOKENS = 1 << 20
"""Prompt tokens of one request, about 7 MB of JSON: more go as several requests, which the server puts together."""
TRIES = 10
"""How often a server may take other weights between it was asked to load some and asked to generate with them."""


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


@dataclass(eq=False)
class Part:
    """What one server is asked for in one request."""

    server: ServerRecord
    works: list[Work]
    ticket: Ticket


@dataclass(frozen=True)
class MovingWeights:
    """Weights that servers exchange for newer ones in the midst of completions."""

    newest: Callable[[], wire.Weights]
    digests: Mapping[int, str]
    """By version, of all weights that servers were given: what says that it was sampled by others is refused."""
    refit: Literal["keeps_kv", "recomputes_kv"]


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
    moving: MovingWeights | None = None
    """In flight: the weights may change meanwhile; ``weights`` are those that it began with."""

    @property
    def newest(self) -> wire.Weights:
        """What is asked for now."""
        return self.weights if self.moving is None else self.moving.newest()


class Fleet(Servers):
    """Has the servers generate. Its methods block; several may run at a time, each in a thread of its own."""

    def generate(self, call: Call, number: int | None = None) -> None:
        """Have everything generated; ``call.on_finish`` is told of each completion exactly once.

        Args:
            number: what ``queues.enter`` gave, where the call's place among others was taken beforehand.

        Raises:
            RunError: too few servers are left, or a prompt has failed too often; names each server and why.
            RequestError: a server's engine has not what is asked for.
            FloatingPointError: a server's weights give log-probs that are not finite.
            Interrupted: a stop broke it off.
        """
        place = self.queues.enter(call.weights.id) if number is None else number
        try:
            asyncio.run(self.with_session(lambda session: self._generate(session, call, place)))
        finally:
            self.queues.leave(place)

    async def _generate(self, session: aiohttp.ClientSession, call: Call, number: int) -> None:
        waiting = [
            Work(i, list(range(len(row))), len(prompt) + len(row) * call.sampling.max_new_tokens)
            for i, (prompt, row) in enumerate(zip(call.prompts, call.seeds, strict=True))
            if row
        ]
        servers: list[ServerRecord] = []
        running: dict[asyncio.Task[None], Part] = {}

        def start(server: ServerRecord, works: Sequence[Work], has_weights: bool) -> None:
            for request in _requests(works, call.prompts):
                tokens = sum(work.tokens for work in request)
                part = Part(server, request, self.queues.put(Ticket(server.instance, number, tokens)))
                running[asyncio.create_task(self._in_turn(session, part, call, has_weights))] = part

        try:
            while waiting or running:
                if waiting:
                    alone = call.moving is None and self.queues.alone(
                        call.weights.id
                    )  # else each server gets the weights in its turn
                    if fresh := not servers or len(servers) < self.min_servers:
                        servers = await self.usable(session, call.weights if alone else None)
                    servers = sorted(servers, key=lambda server: self.queues.tokens(server.instance))
                    # The parts themselves depend on nothing but the number of servers, as log-probs depend in their
                    # last bits on what is in a batch; who gets which part, and takes it over, is a matter of time.
                    # In flight they depend on time as well.
                    known = bool(running) or call.moving is not None
                    busy = [self.queues.tokens(server.instance) if known else 0 for server in servers]
                    for server, works in zip(servers, distribute(waiting, busy, self.share), strict=True):
                        start(server, works, has_weights=fresh and alone)
                    waiting = []
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    part = running.pop(task)
                    self.queues.done(part.ticket)
                    left = self._left_over(task, part)
                    if left is not None:
                        servers = [server for server in servers if server is not part.server]
                        waiting += left
                    elif all(other.server is not part.server for other in running.values()):
                        start(part.server, _taken_over(running.values()), has_weights=False)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for part in running.values():
                self.queues.done(part.ticket)

    def _left_over(self, task: asyncio.Task[None], part: Part) -> list[Work] | None:
        """What a request that has failed leaves to other servers; None: it went well."""
        try:
            task.result()
        except ServerError as error:
            self.fail(part.server, str(error))
            return self._again(part.works, f"server {part.server.index} ({part.server.address}): {error}")
        return None

    async def _in_turn(self, session: aiohttp.ClientSession, part: Part, call: Call, has_weights: bool) -> None:
        """Wait until it is this request's turn at its server, and have the server load the weights and generate."""
        part.ticket.running = call.moving is not None  # servers take up what comes in flight between two steps
        while part.works and not self.queues.run(part.ticket):
            await asyncio.sleep(TURN_S)
        for _ in range(TRIES if part.works else 0):
            try:
                if not has_weights:
                    await self.load(session, part.server, call.newest, at_once=call.moving is not None)
                return await self._attempt(session, part, call)
            except OtherWeightsError as error:  # another rank was faster to have it load its own
                has_weights, reason = False, error
        if part.works:
            raise ServerError(f"{TRIES} times: {reason}")

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

    async def _attempt(self, session: aiohttp.ClientSession, part: Part, call: Call) -> None:
        """Have one server generate what is left of some prompts; what it has sent before it fails counts."""
        works = part.works
        asked = [tuple(work.left) for work in works]
        request = wire.GenerateRequest(
            call.newest.id,
            call.sampling,
            [call.prompts[work.prompt] for work in works],
            [[call.seeds[work.prompt][j] for j in numbers] for work, numbers in zip(works, asked, strict=True)],
            "waits" if call.moving is None else call.moving.refit,
        )
        digests = None if call.moving is None else call.moving.digests
        async for k, n, completion in self._answers(session, part.server, request, digests):
            if not (0 <= k < len(works) and 0 <= n < len(asked[k]) and asked[k][n] in works[k].left):
                raise ServerError(f"sent completion {n} of prompt {k}, which it was not asked for, or twice")
            if not _is_by(completion, request):
                raise ServerError(
                    f"answered with policy version {completion.policy_version} instead of {request.weights}"
                )
            if completion.routes is not None and len(completion.routes.prompt) != len(request.prompts[k]):
                raise ServerError(f"sent routes of {len(completion.routes.prompt)} tokens for prompt {k}")
            works[k].left.remove(asked[k][n])
            part.ticket.tokens -= call.sampling.max_new_tokens
            call.on_finish(works[k].prompt, asked[k][n], completion)
        if any(work.left for work in works):
            raise ServerError("left out completions that it was asked for")

    async def _answers(
        self,
        session: aiohttp.ClientSession,
        server: ServerRecord,
        request: wire.GenerateRequest,
        digests: Mapping[int, str] | None,
    ) -> AsyncIterator[tuple[int, int, Completion]]:
        url, body = f"{server.address}{wire.API}/generate", wire.encode_request(request)
        traced = traced_servers.begin(server.index)
        headers = {traced_servers.HEADER: "1"} if traced else None
        with failures_named(self.timeout_s):
            async with session.post(url, data=body, headers=headers) as response:
                if response.status != 200:
                    _raise(server, complaint(response, answer := load_object(await response.read())), answer)
                messages, prompts, heard = wire.MessageReader(), dict[int, np.ndarray](), time.monotonic()
                async for data in response.content.iter_any():
                    if time.monotonic() - heard > self.timeout_s:  # bytes came, and never a whole message
                        raise ServerError(f"sent no whole message for {self.timeout_s:g} s")
                    for message, binary in messages.read(data):
                        heard = time.monotonic()
                        if "error" in message:
                            _raise(server, message["error"], message)
                        if "done" in message:
                            if traced:
                                traced.ends(message, request.sequences)
                            return
                        sent = wire.decode_completion(message, binary, prompts, digests, self.vocab_size)
                        yield _as_asked(sent, request.sampling)
        raise ServerError("the connection ended before the answer did")


def _is_by(completion: Completion, request: wire.GenerateRequest) -> bool:
    """Whether the policy that sampled its first token is the one asked for, or in flight a newer one."""
    asked = request.weights.policy_version
    return completion.policy_version == asked or (request.refit != "waits" and completion.policy_version > asked)


def _as_asked(answer: tuple[int, int, Completion], sampling: SamplingSpec) -> tuple[int, int, Completion]:
    """The answer itself, if it can be one of this sampling: a wrong one must not reach the learner."""
    completion = answer[2]
    if completion.finish_reason not in ("stop", "length"):
        raise ServerError(f"sent a completion with finish_reason={str(completion.finish_reason)[:40]!r}")
    if len(completion.token_ids) > sampling.max_new_tokens:
        raise ServerError(
            f"sent a completion of {len(completion.token_ids)} tokens, but sampling.max_new_tokens is "
            f"{sampling.max_new_tokens}"
        )
    if not np.isfinite(completion.logprobs).all():
        raise ServerError("sent log-probs that are not finite")
    return answer


def distribute(works: Sequence[Work], busy: Sequence[int], share: tuple[int, int] = (0, 1)) -> list[list[Work]]:
    """Give each server its part of the work: a prompt goes to the server with the fewest tokens so far.

    Prompts with the most completions are given away first; among equals the order of the prompts counts, which is
    longest expected first. Each server's part is in the order of the prompts, so that a server alone is asked exactly
    what an engine in process would be.

    Args:
        busy: tokens that each server has to generate already.
        share: which of how many ranks does this. Among equals each begins with another server: ranks that have fewer
            prompts than there are servers would all ask the first ones.
    """
    rank, ranks = share
    order = [(k + rank * len(busy) // ranks) % len(busy) for k in range(len(busy))]
    parts: list[list[Work]] = [[] for _ in busy]
    tokens = list(busy)
    for work in sorted(works, key=lambda work: (-len(work.left), work.prompt)):
        least = min(order, key=tokens.__getitem__)
        parts[least].append(work)
        tokens[least] += work.tokens
    return [sorted(part, key=lambda work: work.prompt) for part in parts]


def _taken_over(parts: Iterable[Part]) -> list[Work]:
    """The work of a request that still waits for its turn, for a server that has nothing left to do; the largest."""
    waiting = [part for part in parts if not part.ticket.running and part.works]
    if not waiting:
        return []
    part = max(waiting, key=lambda part: part.ticket.tokens)
    works, part.works, part.ticket.tokens = part.works, [], 0
    return works


def _requests(works: Sequence[Work], prompts: Sequence[np.ndarray]) -> Iterator[list[Work]]:
    """One server's part, cut into requests of a bounded size."""
    return buckets(works, lambda work: len(prompts[work.prompt]), REQUEST_TOKENS)


def _raise(server: ServerRecord, message: str, answer: dict[str, Any]) -> NoReturn:
    """A failed answer of ``generate``; what is asked for, or weights that are not finite, is not the server's fault."""
    if answer.get("reason") == "not_finite":
        raise FloatingPointError(answer["error"])
    if answer.get("reason") == "request":
        raise RequestError(f"rollout server {server.index} ({server.address}): {message}")
    if answer.get("reason") in ("other_weights", "no_weights"):  # it has taken others since it was asked, or is at it
        raise OtherWeightsError(message)
    raise ServerError(message)
