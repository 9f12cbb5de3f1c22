"""The trainer's side of a collective refit: every rank sends its parts to the ranks that hold them in a server."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.collective.digest import digest
from nemo_aapo.engines.collective.meeting import (
    Meeting,
    boxes_of,
    failures_named,
    meet,
    new_store,
    open_store,
    packed,
    reachable_address,
)
from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.remote.directory import ServerRecord
from nemo_aapo.errors import ServerError, WeightsError
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.mcore.state import WeightPart, weight_parts


class WeightSender:
    """One rank's part in it. Methods are collective over all ranks of the trainer unless they say otherwise."""

    def __init__(self, module: GPTModel, vocab_size: int, timeout_s: float) -> None:
        """
        Args:
            module: this rank's stage, whose memory is read at each refit.
            timeout_s: the longest that a server's ranks are waited for.
        """
        self.timeout_s, self.sent_bytes = timeout_s, 0
        self._module, self._vocab_size = module, vocab_size
        self._parts: list[WeightPart] = []
        self._store: dist.Store | None = None
        self._address = self._secret = ""
        self._meetings: dict[str, tuple[Rendezvous, Meeting | None]] = {}  # by the server's instance

    def digest(self) -> str:
        """Of the weights as they are now, which ``send`` sends from here on."""
        self._parts = weight_parts(self._module, self._vocab_size)  # anew: an optimizer may have moved them
        return digest(self._parts)

    def rendezvous(self, servers: Sequence[ServerRecord]) -> list[Rendezvous]:
        """Where each server is to meet the trainer: as last time, if nothing has gone wrong since."""
        self._open_store([server.host for server in servers])
        return [self._rendezvous_with(server) for server in servers]

    def send(self, servers: Sequence[ServerRecord]) -> list[str]:
        """Send the weights to these servers at once; why it failed with each, or an empty text, the same on all ranks.

        A server that dies breaks off its own part; one that says nothing is given up after ``timeout_s``.
        """
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            mine = list(threads.map(self._send_to, servers))
        everyone: list[list[tuple[str, int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        self.sent_bytes = sum(count for part in everyone for _, count in part)
        reasons = [next((reason for reason, _ in column if reason), "") for column in zip(*everyone, strict=True)]
        for server, reason in zip(servers, reasons, strict=True):
            if reason:
                self.part_from(server)
        return reasons

    def forget(self) -> None:
        """Let go of what was sent: merged adapters have memory of their own. Not collective."""
        self._parts = []

    def part_from(self, server: ServerRecord) -> None:
        """Meet a server anew next time. Called on all ranks, and not collective."""
        _, meeting = self._meetings.pop(server.instance, (None, None))
        if meeting is not None:
            meeting.close()

    def give_up(self, meeting: Rendezvous, reason: str) -> None:
        """Tell all ranks not to wait for a server that won't come. Not collective."""
        if self._store is not None:
            self._store.set(f"{meeting.name}/failed", reason)

    def close(self) -> None:
        """End all connections. Not collective."""
        for _, meeting in self._meetings.values():
            if meeting is not None:
                meeting.close()
        self._meetings.clear()

    # ------------------------------------------------------------------ parts

    def _open_store(self, servers: Sequence[str]) -> None:
        if self._store is not None:
            return
        first, store = parallel.rank() == 0, None
        if first:
            store, self._address = new_store(reachable_address(servers), self.timeout_s)
            self._secret = secrets.token_urlsafe(16)
        self._address, self._secret = parallel.broadcast_from_first_rank((self._address, self._secret))
        self._store = store or open_store(self._address, self.timeout_s)
        self._store.set(f"senders/{parallel.rank()}", packed(boxes_of(self._parts)))

    def _rendezvous_with(self, server: ServerRecord) -> Rendezvous:
        if server.instance not in self._meetings:
            name = f"{self._secret}/{server.instance}/{parallel.broadcast_from_first_rank(secrets.token_hex(4))}"
            meeting = Rendezvous(self._address, name, dist.get_world_size(), server.ranks)
            self._meetings[server.instance] = meeting, None
        return self._meetings[server.instance][0]

    def _send_to(self, server: ServerRecord) -> tuple[str, int]:
        """Why it failed, if it did, and the bytes that went to one server."""
        where, meeting = self._meetings[server.instance]
        try:
            if meeting is None:
                meeting = meet(
                    open_store(where.address, self.timeout_s),  # who waits on one keeps others from using it
                    where,
                    rank=parallel.rank(),
                    boxes=boxes_of(self._parts),
                    device=self._parts[0].tensor.device,
                    server=server.index,
                    timeout_s=self.timeout_s,
                )
                self._meetings[server.instance] = where, meeting
            with failures_named("sending weights"):
                return "", meeting.exchange(parallel.rank(), self._parts)
        except (ServerError, WeightsError) as error:
            return str(error), 0
