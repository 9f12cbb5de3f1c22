"""Which prompts a process is sampling for a store, so that the runs that share it do not sample the same at once.

A claim is a lock on one byte of a file beside the store, at a place that follows from key and prompt. The kernel, or
the network file system, takes it back when its process ends, however that ends: nothing has to be tidied up, and no
clock is asked.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

from nemo_aapo.errors import StoreError
from nemo_aapo.reference_store.key import StoreKey
from nemo_aapo.utils.files import NO_LOCKS

_TAKEN = (errno.EACCES, errno.EAGAIN)
_PLACES = 2**62
"""Offsets of a file are below 2**63; two prompts share a place about never."""


class Claims:
    """The claims of this process on prompts of one key."""

    def __init__(self, store: Path, key: StoreKey) -> None:
        """Touch no file.

        Args:
            store: the store's path.
        """
        self._path, self._key = store.with_name(f"{store.name}.claims"), key
        self._file: int | None = None

    def take(self, prompt_id: str) -> bool:
        """Whether a prompt is this process's to sample from now on; False: another one is at it.

        Where a file system has no locks, every prompt is: two runs may then sample the same, to the same values.

        Raises:
            StoreError: the file can't be made, or not be locked.
        """
        place = int.from_bytes(hashlib.sha256(f"{self._key.digest} {prompt_id}".encode()).digest()[:8], "big")
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place % _PLACES)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in NO_LOCKS:
                raise StoreError(f"{self._path}: {error.strerror}. The store's folder must be writable") from error
        return True

    def drop(self) -> None:
        """Give all of them back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
