"""Which rollout servers can be used: who is there, who has which weights, who failed and why."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from nemo_aapo.engines.messages import load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, read_servers
from nemo_aapo.engines.remote.queues import Queues
from nemo_aapo.errors import OtherWeightsError, RunError, ServerError, WeightsRefusedError, WireError
from nemo_aapo.run.stop import heed
from nemo_aapo.trace import servers as traced_servers

T = TypeVar("T")

PROBE_S = 10.0
"""A server that does not answer ``ready`` within this is hanging."""
POLL_S = 0.25
"""Pause before servers that were not usable are asked again."""
TURN_S = 0.05
"""Pause before it is asked again whether a server has ended what comes first."""
HEED_S = 1.0
"""Pause before a call looks again whether a stop was asked for."""
FORGIVE_S = 60.0
"""A server that failed is asked again after this, or when nobody else is left."""
_PROBE = aiohttp.ClientTimeout(total=PROBE_S)


class Starting(ServerError):
    """A server that is not there yet, which is no fault."""


class Servers:
    """All servers of one directory, and what is known of them."""

    def __init__(
        self,
        directory: str | Path,
        *,
        servers: int,
        min_servers: int = 1,
        wait_s: float,
        timeout_s: float,
        retries: int,
        patience_s: float = math.inf,
        admit: Callable[[ServerRecord], None] = lambda server: None,
        share: tuple[int, int] = (0, 1),
        vocab_size: int = wire.ANY_TOKEN,
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
            patience_s: what servers are at is waited for so long once a stop was asked for; servers that are not there
                are not.
            admit: raises where a server must not be used at all; asked before it is told of any weights.
            share: which of how many ranks asks these servers, each for prompts of its own.
            vocab_size: a server that sends other token ids is left out.
            log: told once of each server that is left out.

        Raises:
            ConfigError: directory or token are open to others.
        """
        self.directory = open_directory(directory)
        self.servers, self.min_servers = servers, min_servers
        self.wait_s, self.timeout_s, self.retries, self.share = wait_s, timeout_s, retries, share
        self.patience_s, self.admit, self._log = patience_s, admit, log
        self.vocab_size = vocab_size
        self._complete = False
        self._failed: dict[str, tuple[float, str]] = {}  # by instance: when and why
        self.queues = Queues()
        """Of this process's requests."""
        self.whole_of: Callable[[wire.Weights], wire.Weights | None] = lambda weights: None
        """Weights in another form, for a server that can't use the first one; None: there is none."""

    def prepare(self, weights: wire.Weights, at_once: bool = False) -> None:
        """Have all servers serve these weights.

        Args:
            at_once: also those that are generating, which take them between two decoding steps.

        Raises:
            RunError: too few do in time; names each server and why.
            Interrupted: a stop broke it off.
        """
        asyncio.run(self.with_session(lambda session: self.usable(session, weights, at_once)))

    def push(self, weights: wire.Weights) -> None:
        """The same at once, for those that can; one that fails is left out, and nobody waits for it.

        Raises:
            Interrupted: a stop broke it off.
        """

        async def push(session: aiohttp.ClientSession) -> None:
            servers = read_servers(self.directory)
            for record in servers:
                self.admit(record)
            await asyncio.gather(*(self._problem(session, record, weights, at_once=True) for record in servers))

        asyncio.run(self.with_session(push))

    async def with_session(self, action: Callable[[aiohttp.ClientSession], Awaitable[T]]) -> T:
        """The action's result, which may talk to the servers."""
        if not self.directory.is_dir():
            raise RunError(f"{self.directory}: the rollout servers' directory is gone; start them again with the run")
        headers = {"Authorization": f"Bearer {open_token(self.directory)}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S, sock_read=self.timeout_s)
        # trust_env stays off: no proxy has a part in this, and the token goes to the servers alone
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            acting = asyncio.ensure_future(action(session))
            try:
                while not (await asyncio.wait([acting], timeout=HEED_S))[0]:
                    heed("rollout servers", self.patience_s)
                return acting.result()
            finally:
                acting.cancel()
                await asyncio.gather(acting, return_exceptions=True)

    async def usable(
        self, session: aiohttp.ClientSession, weights: wire.Weights | None, at_once: bool = False
    ) -> list[ServerRecord]:
        """The servers that have these weights, after those that had others were told to load them; None: all there."""
        end = time.monotonic() + self.wait_s
        while True:
            records = read_servers(self.directory)
            asked = self.not_left_out(records) or records
            for record in asked:
                self.admit(record)
            problems = await asyncio.gather(*(self._problem(session, record, weights, at_once) for record in asked))
            usable = [record for record, problem in zip(asked, problems, strict=True) if problem is None]
            if self.are_enough(len(usable)):
                return usable
            if time.monotonic() >= end:
                reasons = {record.index: problem for record, problem in zip(asked, problems, strict=True)}
                raise RunError(self.too_few(records, reasons, len(usable)))
            heed("rollout servers")
            await asyncio.sleep(POLL_S)

    def not_left_out(self, records: Sequence[ServerRecord]) -> list[ServerRecord]:
        """Those that have not failed lately: what hangs is not to cost a deadline in each step."""
        now = time.monotonic()
        return [r for r in records if now - self._failed.get(r.instance, (-math.inf, ""))[0] >= FORGIVE_S]

    def are_enough(self, servers: int, settled: bool = True) -> bool:
        """Whether so many servers are: all at first; once they were there (and ``settled``), the least number."""
        enough = servers >= (self.min_servers if self._complete else self.servers)
        self._complete |= enough and settled
        return enough

    async def _problem(
        self, session: aiohttp.ClientSession, server: ServerRecord, weights: wire.Weights | None, at_once: bool = False
    ) -> str | None:
        """Why a server can't be used now; None: it serves these weights, or is there if none are named."""
        try:
            await self.load(session, server, weights, at_once)
        except (Starting, OtherWeightsError) as error:
            return str(error)
        except ServerError as error:
            self.fail(server, str(error))
            return str(error)
        self._failed.pop(server.instance, None)
        return None

    async def load(
        self,
        session: aiohttp.ClientSession,
        server: ServerRecord,
        weights: wire.Weights | None,
        at_once: bool = False,
    ) -> None:
        """Have a server serve these weights, once what it generates with others has ended, or at once.

        Raises:
            OtherWeightsError: it has newer ones by now.
            ServerError: it does not.
        """
        moved, left = time.monotonic(), None
        while True:
            has, outstanding = await self.served(session, server)
            if weights is None or has == weights.id:
                return
            if at_once or not outstanding:
                return await self._update(session, server, weights)
            if outstanding != left:  # other ranks' completions, which go first
                moved, left = time.monotonic(), outstanding
            if time.monotonic() - moved > self.timeout_s:
                raise ServerError(
                    f"has {outstanding} completions of other weights than {weights.id} to generate, and ended none for "
                    f"{self.timeout_s:g} s"
                )
            await asyncio.sleep(TURN_S)

    async def served(self, session: aiohttp.ClientSession, server: ServerRecord) -> tuple[wire.WeightsId | None, int]:
        """What a server serves (None: a refit failed half-way, which a whole one mends), and what it has to generate.

        Raises:
            Starting: it is loading its model.
            ServerError: it does not answer, or not as it should.
        """
        with failures_named(PROBE_S):
            async with session.get(f"{server.address}{wire.API}/ready", timeout=_PROBE) as response:
                answer = load_object(await response.read())
        if response.status == 503 and answer.get("reason") == "starting":
            raise Starting("is still loading its model")
        if response.status not in (200, 503):
            raise ServerError(complaint(response, answer))
        return wire.decode_weights_id(answer) if response.status == 200 else None, answer.get("outstanding", 0)

    async def _update(self, session: aiohttp.ClientSession, server: ServerRecord, weights: wire.Weights) -> None:
        if weights.sent:
            raise OtherWeightsError("has other weights; the trainer's ranks send it theirs at the next refit")
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
        began = time.perf_counter_ns()
        with failures_named(self.timeout_s):
            async with session.post(url, data=body) as response:
                answer = load_object(await response.read())
                if answer.get("reason") == "other_weights":
                    raise OtherWeightsError(complaint(response, answer))
                if response.status != 200:
                    raise (WeightsRefusedError if response.status == 422 else ServerError)(complaint(response, answer))
                if wire.decode_weights_id(answer) != weights.id:
                    raise ServerError(f"was told to load {weights.id} and loaded {answer}")
        traced_servers.refitted(server.index, weights.id.policy_version, began)

    def sleep(self) -> None:
        """Have all servers that are there give back their devices' memory. One that fails is left out.

        One that hangs costs ``PROBE_S``; one that is left out, nothing.

        Raises:
            Interrupted: a stop broke it off.
        """

        async def ask(session: aiohttp.ClientSession, server: ServerRecord) -> None:
            try:
                await self.served(session, server)
                with failures_named(self.timeout_s):
                    async with session.post(f"{server.address}{wire.API}/sleep") as response:
                        if response.status != 200:
                            raise ServerError(complaint(response, load_object(await response.read())))
            except Starting:
                pass  # it sleeps at the end of its start
            except ServerError as error:
                self.fail(server, str(error))

        async def ask_all(session: aiohttp.ClientSession) -> None:
            servers = self.not_left_out(read_servers(self.directory))
            await asyncio.gather(*(ask(session, server) for server in servers))

        asyncio.run(self.with_session(ask_all))

    def fail(self, server: ServerRecord, reason: str) -> None:
        """Note that a server has failed."""
        if server.instance not in self._failed:
            self._log(f"rollout server {server.index} ({server.address}) is left out: {reason}")
        self._failed[server.instance] = (time.monotonic(), reason)

    def too_few(self, records: Sequence[ServerRecord], reasons: Mapping[int, str | None], usable: int) -> str:
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


def complaint(response: aiohttp.ClientResponse, answer: dict[str, Any]) -> str:
    """What a server said of a request that it did not do."""
    if response.status == 404:
        return f"HTTP 404: not a server of {wire.API}, but of another version of this code"
    return f"HTTP {response.status}: {answer.get('error') or response.reason}"


@contextmanager
def failures_named(timeout_s: float) -> Iterator[None]:
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
