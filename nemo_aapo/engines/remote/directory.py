"""The directory in which trainer and rollout servers find each other; only this user can read it.

    token             the bearer token; whoever comes first makes it
    server_3.json     the address of server 3, while it listens
    weights/          what the servers load (weight_store.py)
    client            held by whoever decides what they load

No torch: the launcher may import it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import socket
import stat
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from nemo_aapo.config.build import build
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.files import NO_LOCKS, to_json, write_atomic
from nemo_aapo.utils.token import make_token, read_token

CLIENT = "client"
"""Name of the file that a client of the servers holds locked; it says who that is."""


@dataclass(frozen=True)
class ServerRecord:
    """One server as it announces itself.

    Example: ``ServerRecord(3, "http://node7:41001", 5120, "f3a9...")``
    """

    index: int
    """Number of the server, from 0."""
    address: str
    """``http://host:port``"""
    pid: int
    """Its process id on its host."""
    instance: str
    """A new random word at each start: a restarted server is another one."""
    precision: str = ""
    """What it computes in, as ``precision.name`` has it; empty where that is not known."""
    ranks: int = 1
    """Processes that hold its model together."""
    layout: str = ""
    """How they cut it up, for people: ``TP 2 x PP 2``."""

    @property
    def host(self) -> str:
        """Host name or IP address."""
        return self.address.removeprefix("http://").rpartition(":")[0].strip("[]")


def open_directory(path: str | Path) -> Path:
    """Return the directory, which is made (0700) if it is not there.

    Raises:
        ConfigError: others than this user may read or write it, or it can't be made.
    """
    directory = Path(path)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: can't be made ({error.strerror})") from None
    _check_private(directory)
    return directory


def open_token(directory: Path) -> str:
    """The token, which is made now if it is not there yet.

    Raises:
        ConfigError: the file is readable by others, or holds none.
    """
    path = make_token(directory)
    _check_private(path)
    return read_token(path)


class Claim:
    """The right to decide what the servers of a directory serve, until it is dropped or its process ends.

    Any number of clients may share servers that stay with the base model; one that has them load something else must
    be alone.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        """Share the servers.

        Args:
            owner: who this is, for those that are refused.

        Raises:
            ConfigError: another client has them load weights of its own.
        """
        self.directory, self.owner = directory, owner
        self._file = os.fdopen(os.open(directory / CLIENT, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8")
        os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(self._file)))
        self._lock(fcntl.LOCK_SH)

    def take(self) -> None:
        """Be the only one from now on.

        Raises:
            ConfigError: the servers have another client.
        """
        self._lock(fcntl.LOCK_EX)

    def drop(self) -> None:
        """Leave the servers to others."""
        self._file.close()

    def _lock(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise ConfigError(
                f"rollout.remote.directory={self.directory}: its servers are in use by {holder}, and a server serves "
                "one client's weights at a time. Wait for its end, or start other servers in another directory"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} ({self.owner})\n")
        self._file.flush()


def _close(file: weakref.ref[TextIO]) -> None:
    """In a child: one that outlives this process must not keep the servers."""
    if (held := file()) is not None:
        held.close()


def publish(directory: Path, record: ServerRecord) -> None:
    """Announce a server that listens."""
    write_atomic(_path(directory, record.index), to_json(asdict(record)) + "\n", mode=0o600)


def withdraw(directory: Path, record: ServerRecord) -> None:
    """Take the announcement back, unless a server that was started later has replaced it."""
    if any(other == record for other in read_servers(directory)):
        _path(directory, record.index).unlink(missing_ok=True)


def read_servers(directory: Path) -> list[ServerRecord]:
    """All servers that have announced themselves, by index; some may have been killed since.

    Raises:
        ConfigError: a file is not what a server writes.
    """
    records = []
    for path in directory.glob("server_*.json"):
        try:
            record = build(ServerRecord, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:  # withdrawn since the listing
            continue
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not written by a rollout server ({error}). Remove it") from None
        if not re.fullmatch(r"http://[^/?#@]+:\d+", str(record.address)):
            raise ConfigError(f"{path}: address {record.address!r} is not of the form http://host:port. Remove it")
        records.append(record)
    return sorted(records, key=lambda record: record.index)


def _path(directory: Path, index: int) -> Path:
    return directory / f"server_{index}.json"


def _check_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path}: belongs to another user; name another rollout.server.directory")
    if loose := stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{path}: open to others (mode bits {loose:03o}). Who has the token can use the servers: "
                          f"chmod go= {path}")  # fmt: skip
