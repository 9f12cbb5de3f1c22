"""A server's side: buckets of weights in the trainer's memory, read one after the other. No Megatron."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.channel import Channel, connect
from nemo_aapo.engines.remote.weight_store import require_architecture
from nemo_aapo.errors import ServerError, WeightsError


@dataclass(frozen=True)
class SharedBucket:
    """One bucket; its memory is the trainer's, and stays until the next one is asked for."""

    parts: Mapping[str, Any]
    """Device -> handles and digest, as JSON."""
    descriptor: int | None
    """Of host memory."""

    def handles_on(self, device: str) -> list[memory.TensorHandle]:
        """What lies on a device.

        Raises:
            WeightsError: nothing does.
        """
        part = self.parts.get(device)
        if not isinstance(part, Mapping):
            raise WeightsError(f"the trainer sent nothing of what lies on {device}")
        return memory.decode(part.get("handles"))

    def tensors_on(self, device: torch.device, name: str) -> memory.NamedTensors:
        """The tensors, each of which is as the trainer has it.

        Raises:
            WeightsError: one is not.
        """
        tensors = memory.opened(self.handles_on(name), device, self.descriptor)
        if memory.digest(tensors) != self.parts[name].get("digest"):
            raise WeightsError("a bucket of weights did not arrive as the trainer has it")
        return tensors


class Visit:
    """A server's rank at the trainer's socket, for one refit."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.config = self._message("config")[0]
        """The ``config.json`` of the trainer's model."""

    def buckets(self) -> Iterator[SharedBucket]:
        """All buckets. Asking for the next one says that the one before is taken.

        Raises:
            ServerError: the trainer is gone, or says nothing.
        """
        taken = 0
        while True:
            parts, descriptor = self._message("buckets", "end")
            if not isinstance(parts, Mapping):
                if parts != taken:
                    raise WeightsError(f"the trainer sent {parts} buckets of weights, and {taken} came")
                return
            try:
                yield SharedBucket(parts, descriptor)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            taken += 1
            self._channel.send({"taken": taken})

    def _message(self, *names: str) -> tuple[Any, int | None]:
        message, descriptor = self._channel.receive()
        if "refused" in message:
            raise WeightsError(str(message["refused"]))
        for name in names:
            if name in message:
                return message[name], descriptor
        raise ServerError(f"the trainer sent neither {' nor '.join(names)}")


@contextmanager
def visit(where: Rendezvous, devices: Sequence[str], timeout_s: float) -> Iterator[Visit]:
    """Inside, this rank is connected to the trainer.

    Args:
        devices: that it computes on, each ``memory.HOST`` or a GPU's UUID.

    Raises:
        ServerError: the trainer can't be reached, or says nothing.
        WeightsError: it holds no weights there.
    """
    channel = connect(where.address, timeout_s)
    try:
        channel.send({"name": where.name, "devices": list(devices)})
        yield Visit(channel)
    finally:
        channel.close()


@contextmanager
def taking(
    where: Rendezvous,
    model_path: str,
    names: Set[str],
    load: Callable[[Mapping[str, torch.Tensor]], None],
    timeout_s: float,
) -> Iterator[Callable[[], int]]:
    """As ``HostedEngine.meeting``, of an engine whose weights are loaded by name.

    Args:
        model_path: the server's own model.
        names: of its tensors.
        load: takes them over.

    Raises:
        ServerError: the trainer can't be reached, or is gone.
        WeightsError: they are of another architecture, are not all there, or did not arrive as the trainer has them.
    """
    device, name = memory.own_device()
    with visit(where, [name], timeout_s) as found:
        require_architecture(found.config, model_path)

        def take() -> int:
            pairs = (pair for bucket in found.buckets() for pair in bucket.tensors_on(device, name))
            tensors = ArrivingTensors(pairs, names)
            load(tensors)
            tensors.read_on()
            return tensors.nbytes

        yield take


class ArrivingTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, as whoever loads a model asks for them: read on until the wanted one has come.

    What is passed over on the way is kept in host memory until it is asked for. Trainer and server take tensors in much
    the same order, so that this is little.
    """

    def __init__(self, arriving: Iterator[tuple[str, torch.Tensor]], names: Set[str]) -> None:
        """Args: names: of all tensors that the model has."""
        self._arriving, self._names = arriving, names
        self._kept: dict[str, torch.Tensor] = {}
        self.nbytes = 0
        """Of all that have come."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kept:
            return self._kept.pop(name)
        for found, tensor in self._arriving:
            self.nbytes += tensor.nbytes
            if found == name:
                return tensor.clone() if tensor.is_cuda else tensor  # the trainer's, until the next bucket is asked for
            self._kept[found] = tensor.to("cpu", copy=True)
        raise WeightsError(f"{name} did not come from the trainer")

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read_on(self) -> None:
        """Take what nobody has asked for: other ranks' tensors."""
        for _, tensor in self._arriving:
            self.nbytes += tensor.nbytes
