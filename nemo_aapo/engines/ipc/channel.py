"""Messages over a socket of this machine: JSON objects, some with a file descriptor beside them."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from nemo_aapo.engines.messages import dump_object, load_object
from nemo_aapo.errors import ServerError, WeightsError, WireError

LOOK_S = 0.5
"""Whoever waits looks up this often."""
MOST_BYTES = 1 << 28
"""Of one message: the handles of 500,000 tensors."""
SCHEME = "unix:"
"""What the address of such a socket begins with."""


class Channel:
    """One end of a connection; each wait has a deadline."""

    def __init__(self, connection: socket.socket, timeout_s: float, heed: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            timeout_s: the longest silence of the other end.
            heed: called every ``LOOK_S`` of any wait; may raise.
        """
        self._socket, self._timeout_s, self._heed = connection, timeout_s, heed
        connection.settimeout(LOOK_S)

    def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        """Send a message.

        Raises:
            ServerError: the other end is gone, or takes nothing within the deadline.
        """
        body = dump_object(message)
        data = memoryview(len(body).to_bytes(4, "big") + body)
        descriptors = [] if descriptor is None else [descriptor]
        deadline = time.monotonic() + self._timeout_s
        while data:
            sent = self._until(deadline, functools.partial(socket.send_fds, self._socket, [data], descriptors))
            data, descriptors = data[sent:], []

    def receive(self, deadline: float | None = None) -> tuple[dict[str, Any], int | None]:
        """The next message, and the file descriptor beside it, which is the caller's to close.

        Args:
            deadline: by ``time.monotonic``; None: ``timeout_s`` from now.

        Raises:
            ServerError: the other end is gone, or says nothing within the deadline, or something else than a message.
        """
        descriptors: list[int] = []
        deadline = time.monotonic() + self._timeout_s if deadline is None else deadline
        try:
            size = int.from_bytes(self._read(4, descriptors, deadline), "big")
            if size > MOST_BYTES:
                raise ServerError(f"a message of {size} bytes")
            try:
                message = load_object(self._read(size, descriptors, deadline))
            except WireError as error:
                raise ServerError(str(error)) from None
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, descriptors[0] if descriptors else None

    def _read(self, size: int, descriptors: list[int], deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            read = functools.partial(socket.recv_fds, self._socket, size - len(data), 1, socket.MSG_CMSG_CLOEXEC)
            part, found, _, _ = self._until(deadline, read)
            descriptors += found
            if not part:
                raise ServerError("the connection for weights ended")
            data += part
        return data

    def _until(self, deadline: float, action: Callable[[], Any]) -> Any:
        while True:
            try:
                return action()
            except TimeoutError:
                self._heed()
                if time.monotonic() > deadline:
                    raise ServerError(f"no message about weights moved for {self._timeout_s:g} s") from None
            except OSError as error:
                raise ServerError(f"the connection for weights broke ({error.strerror or error})") from None

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def connect(address: str, timeout_s: float) -> Channel:
    """Reach whoever listens there.

    Args:
        address: ``unix:PATH``.

    Raises:
        ServerError: nobody does.
        WeightsError: it is an address of another kind.
    """
    if not address.startswith(SCHEME):
        raise WeightsError("this server's engine takes weights by rollout.refit=files, delta or ipc only")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address.removeprefix(SCHEME))
    except OSError as error:
        connection.close()
        raise ServerError(
            f"the trainer's socket {address} can't be reached ({error.strerror}): with rollout.refit=ipc servers run "
            "on the trainer's machine and see its temporary directory"
        ) from None
    return Channel(connection, timeout_s)
