"""A refit without files from end to end: who needs the weights, asking them to come, sending, and who has failed."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import aiohttp

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_first_rank
from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.remote.directory import ServerRecord, read_servers
from nemo_aapo.engines.remote.dispatch import Fleet
from nemo_aapo.engines.remote.servers import POLL_S, Starting
from nemo_aapo.engines.weights import Weights, WeightsId
from nemo_aapo.errors import RunError, ServerError
from nemo_aapo.run.stop import heed

Update = tuple[ServerRecord, Weights]
"""A server and what it is to take, where."""


class Sender(Protocol):
    """One rank's part in handing the trainer's weights to servers that come for them.

    Collective, but for the last four.
    """

    sent_bytes: int
    """By the last ``send``."""

    def digest(self) -> str:
        """Names the weights as they are now, which ``send`` sends from here on."""
        ...

    def rendezvous(self, servers: Sequence[ServerRecord]) -> list[Rendezvous]:
        """Where each server is to come to."""
        ...

    def send(self, servers: Sequence[ServerRecord]) -> list[str]:
        """Send the weights to these servers; why it failed with each, or an empty text, the same on all ranks."""
        ...

    def forget(self) -> None:
        """Let go of what was made to be sent."""
        ...

    def part_from(self, server: ServerRecord) -> None:
        """Meet a server anew next time."""
        ...

    def give_up(self, meeting: Rendezvous, reason: str) -> None:
        """Wait no longer for a server that won't come; called on rank 0, in any thread."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


class CollectiveRefit:
    """The servers of a fleet, and this rank's part in sending weights to them."""

    def __init__(self, fleet: Fleet, sender: Sender) -> None:
        """Args: fleet: which rank 0 alone asks."""
        self.fleet, self.sender = fleet, sender
        self._expected = 0  # servers that have the weights once all that are sent to have taken them

    def bring(self, version: int) -> tuple[Weights, int]:
        """Send the policy to the servers that have other weights, until enough have it. Collective over all ranks.

        A server that fails holds up nobody beyond its deadline. It is left out (``Servers.not_left_out``), or tried
        again at once where too few are left without it.

        Returns:
            The weights' name, and the bytes that all ranks have sent.

        Raises:
            RunError: too few servers have taken them within ``rollout.remote.wait_s``; names each and why.
        """
        weights = Weights(WeightsId(version, self.sender.digest()), None, sent=True)
        tried: set[str] = set()
        deadline, sent = time.monotonic() + self.fleet.wait_s, 0
        survey = lambda: asyncio.run(  # noqa: E731
            self.fleet.with_session(lambda session: self._without(session, weights.id, tried, deadline))
        )
        while servers := on_first_rank(survey):
            reasons = self._send(servers, weights)
            sent += self.sender.sent_bytes
            if not any(reasons):  # as each has said itself
                self.fleet.are_enough(self._expected)
                break
            tried |= {server.instance for server, reason in zip(servers, reasons, strict=True) if reason}
        self.sender.forget()
        return weights, sent

    def _send(self, servers: Sequence[ServerRecord], weights: Weights) -> list[str]:
        """Why it failed with each server, or an empty text."""
        meetings = self.sender.rendezvous(servers)
        updates = [(s, dataclasses.replace(weights, rendezvous=m)) for s, m in zip(servers, meetings, strict=True)]
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(self._ask, updates) if parallel.rank() == 0 else None
            reasons = self.sender.send(servers)
        told = on_first_rank(lambda: asked.result() if asked else [])
        for server, reason in zip(servers, told, strict=True):
            if reason:  # it has closed its end, too
                self.sender.part_from(server)
        return [reason or other for reason, other in zip(told, reasons, strict=True)]

    def _ask(self, updates: Sequence[Update]) -> list[str]:
        """Tell the servers to come, and wait until they serve the weights; all ranks learn at once of one that won't.

        Returns:
            Why each does not serve them, or an empty text.
        """

        async def ask(session: aiohttp.ClientSession, server: ServerRecord, weights: Weights) -> str:
            assert weights.rendezvous is not None, "made by _send"
            try:
                await self.fleet.post_update(session, server, weights)
            except ServerError as error:
                self.fleet.fail(server, str(error))
                self.sender.give_up(weights.rendezvous, str(error))
                return str(error)
            return ""

        async def ask_all(session: aiohttp.ClientSession) -> list[str]:
            return await asyncio.gather(*(ask(session, server, weights) for server, weights in updates))

        return asyncio.run(self.fleet.with_session(ask_all))

    async def _without(
        self, session: aiohttp.ClientSession, weights: WeightsId, tried: set[str], deadline: float
    ) -> list[ServerRecord]:
        """The servers that could take the weights and have others; none once enough have them.

        Args:
            tried: instances that have failed; emptied where too few are left without them.
            deadline: by ``time.monotonic``.
        """
        while True:
            records = read_servers(self.fleet.directory)
            for record in records:
                self.fleet.admit(record)
            asked = self.fleet.not_left_out(records)
            if not self.fleet.are_enough(len(asked), settled=False):
                asked = records
            answers = await asyncio.gather(*(self.fleet.served(session, r) for r in asked), return_exceptions=True)
            reasons: dict[int, str | None] = {}
            usable, others = 0, list[ServerRecord]()
            for record, answer in zip(asked, answers, strict=True):
                if isinstance(answer, BaseException):
                    reasons[record.index] = str(answer)
                    if isinstance(answer, ServerError) and not isinstance(answer, Starting):
                        self.fleet.fail(record, str(answer))
                elif answer[0] == weights:
                    usable += 1
                elif record.instance not in tried:
                    others.append(record)
            self._expected = usable + len(others)
            if self.fleet.are_enough(self._expected, settled=not others):
                return others
            if time.monotonic() >= deadline:
                raise RunError(self.fleet.too_few(records, reasons, usable))
            tried.clear()
            heed("rollout servers")
            await asyncio.sleep(POLL_S)
