"""The trainer's side: buckets of weights in memory that the servers of this machine open.

Each device is exported by one rank that computes on it. Rank 0 hands the handles of all devices to every rank of the
servers, over a socket that only this user can reach, and lets go of a bucket when all have taken it:

    server -> trainer   {"name": of the meeting, "devices": that it computes on}
    trainer -> server   {"config": the model's config.json}, or {"refused": why}
    trainer -> server   {"buckets": {device: {"handles": [...], "digest": ...}}}, a file descriptor beside it on a CPU
    server -> trainer   {"taken": how many buckets}
    ...
    trainer -> server   {"end": how many buckets}
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_all_ranks, on_first_rank
from nemo_aapo.engines.collective.digest import digest
from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.channel import LOOK_S, SCHEME, Channel
from nemo_aapo.engines.remote.directory import ServerRecord
from nemo_aapo.engines.remote.weight_store import BUCKET_BYTES
from nemo_aapo.errors import ServerError
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.mcore.state import weight_parts
from nemo_aapo.run.stop import heed
from nemo_aapo.utils.buckets import tensor_buckets

T = TypeVar("T")
NamedWeights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Makes (Hugging Face name, full tensor) of all weights; collective."""
PARTS = 4
"""A server that takes no bucket for so small a part of ``timeout_s`` is given up."""
GREETING_S = 10.0
"""Who has connected says within this which server it is."""


class MemorySender:
    """One rank's part in it; ``CollectiveRefit`` drives it. Methods are collective unless they say otherwise."""

    def __init__(
        self,
        module: GPTModel,
        vocab_size: int,
        named_weights: NamedWeights,
        model_path: str,
        *,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """
        Args:
            module: this rank's stage, by which the weights are named.
            named_weights: what is sent; made anew for each try.
            model_path: the base model's directory, for its ``config.json``.
            timeout_s: the longest that a server takes for all of the weights.
            patience_s: the longest that one is waited for once a stop was asked for.
        """
        self._module, self._vocab_size, self._named_weights = module, vocab_size, named_weights
        self.bucket_bytes = BUCKET_BYTES
        self.sent_bytes = 0
        self._device, self._name = memory.own_device()
        self._names: list[Any] = [None] * dist.get_world_size()  # of all ranks' devices
        dist.all_gather_object(self._names, self._name)
        config = json.loads((Path(model_path) / "config.json").read_bytes())
        self._door = _Door(config, timeout_s, patience_s) if parallel.rank() == 0 else None

    def digest(self) -> str:
        """Names the weights as they are now, whatever the layout."""
        return digest(weight_parts(self._module, self._vocab_size))

    def rendezvous(self, servers: Sequence[ServerRecord]) -> list[Rendezvous]:
        """Where each server is to come to."""
        return on_first_rank(lambda: self._door.invite(servers) if self._door else [])

    def send(self, servers: Sequence[ServerRecord]) -> list[str]:
        """Share the weights with these servers; why it failed with each, or an empty text, the same on all ranks.

        A server that dies costs its own part; one that takes no bucket for long is given up.

        Raises:
            Interrupted: on all ranks; a stop was asked for, and the servers have a part of the weights.
        """
        self.sent_bytes = 0
        try:
            wanted = self._lead(methodcaller("welcome", self._names))
            # Of the ranks on one device the first one. What nobody opens would stay in torch's hands.
            exports = self._name in wanted and self._names.index(self._name) == dist.get_rank()
            count = self._share_all(exports) if wanted else 0
            return self._lead(lambda door: door.end(count))
        finally:
            if self._door is not None:
                self._door.part_from_all()

    def _share_all(self, exports: bool) -> int:
        """Share bucket after bucket, while a server is left; their number. The next one is made while servers read."""
        held: list[memory.Bucket] = []
        count = 0
        try:
            for bucket in tensor_buckets(self._named_weights(), self.bucket_bytes):
                self.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                parts = on_all_ranks(functools.partial(self._share, bucket, held if exports else None))
                descriptor = held[-1].descriptor if held else None
                goes_on = self._lead(methodcaller("hand_over", parts, descriptor, count))
                for taken in held[:-1]:
                    taken.close()
                del held[:-1]
                count += 1
                if not goes_on:
                    break
            self._lead(methodcaller("all_taken", count))
            return count
        finally:
            for shared in held:
                shared.close()

    def _share(self, bucket: memory.NamedTensors, held: list[memory.Bucket] | None) -> dict[str, Any]:
        """This rank's part of what servers are told of a bucket, which goes on in ``held``; None: it has no part."""
        if held is not None:
            held.append(memory.share(bucket, self._device, self._name))
        bucket.clear()  # the export's own tensors
        return held[-1].told() if held else {}

    def _lead(self, action: Callable[[_Door], T]) -> T:
        """What rank 0 did at its door, on all ranks."""
        return on_first_rank(lambda: action(cast(_Door, self._door)))

    def forget(self) -> None:
        """Do nothing: each bucket is let go of when all have taken it."""

    def part_from(self, server: ServerRecord) -> None:
        """Nothing to do: a server comes anew to each refit. Not collective."""

    def give_up(self, meeting: Rendezvous, reason: str) -> None:
        """Wait no longer for a server that won't come. Called on rank 0, in any thread."""
        if self._door is not None:
            self._door.give_up(meeting, reason)

    def close(self) -> None:
        """Remove the socket. Not collective."""
        if self._door is not None:
            self._door.close()


@dataclass(eq=False)
class _Guest:
    """A server as it takes part in one refit."""

    meeting: Rendezvous
    channels: list[Channel] = field(default_factory=list)
    """To its ranks."""
    devices: set[str] = field(default_factory=set)
    """That these compute on."""
    reason: str = ""
    """Why it has failed; empty: it has not."""

    def fail(self, reason: str) -> None:
        """Have no more to do with it."""
        self.reason = self.reason or reason
        for channel in self.channels:
            channel.close()
        self.channels = []


class _Door:
    """On rank 0 of the trainer: the socket, and the servers that come to it."""

    def __init__(self, config: dict[str, Any], timeout_s: float, patience_s: float) -> None:
        # A part of the time only: others wait for a silent server as well, and are not to be taken for silent.
        self._config, self._timeout_s, self._patience_s = config, timeout_s / PARTS, patience_s
        self._guests: list[_Guest] = []
        # A folder of mode 0700; the run directory may be on a file system without sockets, or its path too long.
        self._folder = tempfile.mkdtemp(prefix="nemo_aapo-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._folder}/weights")
        self._listener.listen(1024)
        self._listener.settimeout(LOOK_S)

    def invite(self, servers: Sequence[ServerRecord]) -> list[Rendezvous]:
        """Where each server is to come to; nobody else is let in."""
        address = f"{SCHEME}{self._folder}/weights"
        meetings = [Rendezvous(address, secrets.token_urlsafe(16), 1, server.ranks) for server in servers]
        self._guests = [_Guest(meeting) for meeting in meetings]
        return meetings

    def give_up(self, meeting: Rendezvous, reason: str) -> None:
        """Note in any thread that a server won't come."""
        for guest in self._guests:
            if guest.meeting == meeting:
                guest.reason = guest.reason or reason

    @property
    def _present(self) -> list[_Guest]:
        return [guest for guest in self._guests if not guest.reason]

    def _heed(self) -> None:
        heed("rollout servers that take weights", self._patience_s)

    def welcome(self, devices: Sequence[str]) -> list[str]:
        """Wait for all ranks of all servers; the devices that those compute on that are left.

        Args:
            devices: on which ranks of the trainer hold weights.
        """
        deadline = time.monotonic() + self._timeout_s
        while missing := [guest for guest in self._present if len(guest.channels) < guest.meeting.receivers]:
            self._heed()
            if time.monotonic() > deadline:
                for guest in missing:
                    guest.fail(f"did not come for the weights within {self._timeout_s:g} s")
            with contextlib.suppress(TimeoutError):
                self._let_in(self._listener.accept()[0], devices)
        self._tell_all({"config": self._config})
        return sorted({device for guest in self._present for device in guest.devices})

    def _let_in(self, connection: socket.socket, devices: Sequence[str]) -> None:
        channel = Channel(connection, self._timeout_s, self._heed)
        with contextlib.suppress(ServerError):  # who says nothing, or something else, is no server
            greeting, _ = channel.receive(time.monotonic() + GREETING_S)
            for guest in self._present:
                if guest.meeting.name == greeting.get("name"):
                    guest.channels.append(channel)
                    guest.devices |= set(greeting.get("devices", ()))
                    if missing := sorted(guest.devices - set(devices)):
                        reason = (
                            f"the trainer holds no weights on {missing[0]}, which this server computes on, but on "
                            f"{', '.join(sorted(set(devices)))}: with rollout.refit=ipc servers run on its own devices"
                        )
                        channel.send({"refused": reason})
                        guest.fail(reason)
                    return
        channel.close()

    def hand_over(self, parts: Sequence[dict[str, Any]], descriptor: int | None, count: int) -> bool:
        """Show all servers a bucket, once they have taken those before; whether a server is left.

        Args:
            parts: device -> handles, of each rank.
            count: buckets before this one.
        """
        self.all_taken(count)
        self._tell_all({"buckets": {name: told for part in parts for name, told in part.items()}}, descriptor)
        return bool(self._present)

    def all_taken(self, count: int) -> None:
        """Wait until all servers have taken so many buckets."""
        deadline = time.monotonic() + self._timeout_s
        for guest in self._present if count else []:
            with self._failing(guest):
                for channel in guest.channels:
                    answer, _ = channel.receive(deadline)
                    if answer.get("taken") != count:
                        raise ServerError(f"took {answer.get('taken')} buckets of weights instead of {count}")

    def end(self, count: int) -> list[str]:
        """Tell all servers that these were all; why it failed with each, or an empty text."""
        self._tell_all({"end": count})
        return [guest.reason for guest in self._guests]

    def _tell_all(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        for guest in self._present:
            with self._failing(guest):
                for channel in guest.channels:
                    channel.send(message, descriptor)

    @contextlib.contextmanager
    def _failing(self, guest: _Guest) -> Iterator[None]:
        try:
            yield
        except ServerError as error:
            guest.fail(str(error))

    def part_from_all(self) -> None:
        """End all connections."""
        for guest in self._guests:
            guest.fail("the refit is over")

    def close(self) -> None:
        """Remove the socket."""
        self.part_from_all()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
