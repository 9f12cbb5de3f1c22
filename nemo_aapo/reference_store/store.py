"""Reference rewards on disk: one SQLite file that survives a kill at any moment and that runs share at the same time.

SQLite's rollback journal, not its write-ahead log: the log's index lives in memory that only processes of one machine
share, so that it breaks on a network file system. The journal needs POSIX locks alone, which NFS and Lustre (mounted
with ``flock``) have across machines. Transactions are short, one for each batch, and each is on the disk when ``write``
returns.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from nemo_aapo.errors import ConfigError, StoreError
from nemo_aapo.reference_store.claims import Claims
from nemo_aapo.reference_store.key import StoreKey

FORMAT = 1
"""Number of the tables' layout: a reader refuses another one."""
APPLICATION_ID = 0x4141504F  # "AAPO": tells our files from other SQLite files
LOCK_TIMEOUT_S = 60.0
"""How long to wait for another process to finish its write."""
READ_BATCH = 10_000
"""Number of prompts in one query."""
_TABLES = (
    "CREATE TABLE keys (number INTEGER PRIMARY KEY, digest TEXT UNIQUE NOT NULL, parts TEXT NOT NULL)",
    "CREATE TABLE rewards (key INTEGER NOT NULL REFERENCES keys, prompt TEXT NOT NULL, sample INTEGER NOT NULL, "
    "reward REAL NOT NULL, PRIMARY KEY (key, prompt, sample)) WITHOUT ROWID",
)


class RewardStore:
    """The reference rewards of one key, by prompt and sample number, in a file that may hold other keys' as well.

    What is stored is never changed: where two runs draw the same sample at the same time, the first write stands, and
    both use it.
    """

    def __init__(self, path: str | Path, key: StoreKey, *, create: bool = True, timeout_s: float = LOCK_TIMEOUT_S):
        """Open the file, or make it.

        Args:
            key: what is read and written belongs to it.
            create: False: a missing file is an error.
            timeout_s: how long to wait for another process's write.

        Raises:
            StoreError: a directory, not a store, damaged, of a newer format, or (with ``create=False``) missing.
        """
        self.path, self.key, self._timeout_s = Path(path), key, timeout_s
        self.claims = Claims(self.path, key)
        """Which prompts this process is at, for others that share the file."""
        if self.path.is_dir():
            raise StoreError(f"{self.path}: is a directory; name a file in it (algorithm.reference_store)")
        exists = self.path.exists()
        if not exists and not create:
            raise StoreError(f"{self.path}: no such file; nothing has been stored there yet")
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.read_only = exists and not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK))
            mode = "ro" if self.read_only else "rwc"
            address = f"file:{quote(str(self.path.absolute()))}?mode={mode}"
            # isolation_level=None: transactions begin and end where the code says so
            self._db = sqlite3.connect(address, uri=True, isolation_level=None, timeout=timeout_s)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        if not self._pragma("user_version") and not self.read_only:
            with self._transaction():  # of two that make the file, the second finds the first one's tables
                if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _TABLES:
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version = {FORMAT}")
        if self._pragma("application_id") != APPLICATION_ID:
            raise StoreError(
                f"{self.path}: is an SQLite file, but not a store of reference rewards. Name another file "
                "(algorithm.reference_store)"
            )
        if (found := self._pragma("user_version")) != FORMAT:
            raise StoreError(
                f"{self.path}: has format {found}, this version of nemo_aapo reads {FORMAT}. Use the version that "
                "wrote it, or name another file (algorithm.reference_store)"
            )
        self._pragma("journal_mode = DELETE")  # somebody may have set another one in the file
        if (verdict := self._pragma("quick_check(1)")) != "ok":  # now, not at a late step that reads a bad page
            raise sqlite3.DatabaseError(f"malformed: {verdict}")

    # ------------------------------------------------------------------ rewards

    def read(self, prompt_ids: Sequence[str], samples: int) -> dict[str, np.ndarray]:
        """float64 [1..samples]: the rewards of each prompt that has any, up to its last; NaN where one is missing."""
        found: dict[str, list[float]] = {}
        query = (
            "SELECT prompt, sample, reward FROM rewards WHERE key = (SELECT number FROM keys WHERE digest = ?) "
            "AND prompt IN (SELECT value FROM json_each(?)) AND sample < ? ORDER BY prompt, sample"
        )
        with self._explained():
            for start in range(0, len(prompt_ids), READ_BATCH):
                batch = json.dumps(prompt_ids[start : start + READ_BATCH])
                for prompt, sample, reward in self._db.execute(query, (self.key.digest, batch, samples)):
                    rewards = found.setdefault(prompt, [])
                    rewards += [math.nan] * (sample - len(rewards)) + [reward]
        return {prompt: np.array(rewards, dtype=np.float64) for prompt, rewards in found.items()}

    def write(self, rewards: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Store the rewards [K] of some prompts: all of them or, if interrupted, none.

        A reward that is NaN, as its scoring failed, is not stored: its place stays free for one that can be scored.

        Returns:
            What is stored now, [K] by prompt: where a sample was there already, its old value.

        Raises:
            StoreError: read-only, no space, locked for too long.
            ValueError: an infinite reward.
        """
        for prompt, row in rewards.items():
            if np.isinf(row).any():
                raise ValueError(f"reference rewards of prompt {prompt} are not finite: {row}")
        self.require_writable(len(rewards))
        with self._explained(), self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO keys (digest, parts) VALUES (?, ?)",
                (self.key.digest, json.dumps(self.key.parts)),
            )
            rows = [
                (self.key.digest, prompt, k, float(reward))
                for prompt, row in rewards.items()
                for k, reward in enumerate(row)
                if not math.isnan(reward)
            ]
            self._db.executemany(
                "INSERT OR IGNORE INTO rewards VALUES ((SELECT number FROM keys WHERE digest = ?), ?, ?, ?)", rows
            )
            found = self.read(list(rewards), max((len(row) for row in rewards.values()), default=0))
        return {prompt: padded(found.get(prompt), len(row)) for prompt, row in rewards.items()}

    def require_writable(self, prompts: int) -> None:
        """Refuse to store the rewards of so many prompts in a file or a folder that is read-only.

        Raises:
            StoreError: it is.
        """
        if self.read_only:
            raise StoreError(
                f"{self.path}: is read-only, and {prompts} prompts are not stored in it. Make it and its folder "
                "writable, or name another file (algorithm.reference_store)"
            )

    def items(self) -> Iterator[dict[str, np.ndarray]]:
        """Everything stored under the key, batch by batch as ``write`` takes it."""
        with self._explained():
            query = "SELECT DISTINCT prompt FROM rewards WHERE key = (SELECT number FROM keys WHERE digest = ?)"
            prompts = [prompt for (prompt,) in self._db.execute(query, (self.key.digest,))]
        for start in range(0, len(prompts), READ_BATCH):
            yield self.read(prompts[start : start + READ_BATCH], 2**31)

    def other_keys(self) -> list[dict[str, Any]]:
        """The parts of all keys in the file; empty if ours is among them (or there is none)."""
        with self._explained():
            rows = self._db.execute("SELECT digest, parts FROM keys ORDER BY number").fetchall()
            return [] if self.key.digest in dict(rows) else [dict(json.loads(parts)) for _, parts in rows]

    def close(self) -> None:
        """Close the file."""
        self.claims.drop()
        self._db.close()

    # ------------------------------------------------------------------ SQLite

    def _pragma(self, words: str) -> Any:
        return self._db.execute(f"PRAGMA {words}").fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Takes the write lock at its beginning: a lock asked for later could not be waited for."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as messages that say what to do."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: {error}. {self._remedy(str(error))}") from error
        except (ValueError, TypeError, RecursionError) as error:  # bytes that are no text, text that is no number
            raise StoreError(f"{self.path}: malformed ({error}). {self._remedy('malformed')}") from error

    def _remedy(self, reason: str) -> str:
        if "malformed" in reason or "not a database" in reason:
            return (
                "The store is damaged, or no store. Move it away: it is filled again, to the same values "
                "(algorithm.reference_store names it)"
            )
        if "locked" in reason:
            return (
                f"Another process has kept it for {self._timeout_s:g} s, or the file system has no locks (Lustre "
                "mounted without flock): keep the store elsewhere (algorithm.reference_store)"
            )
        if "full" in reason:
            return "Make room; what was stored before is whole, and the same command goes on from there"
        return "Look at the disk and the file's permissions, or name another file (algorithm.reference_store)"


def keys_of(path: Path) -> list[dict[str, Any]]:
    """The parts of all keys in a file of rewards; empty where it can't be read, which whoever opens it will say."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as opened:
            return [json.loads(parts) for (parts,) in opened.execute("SELECT parts FROM keys ORDER BY number")]
    except (sqlite3.Error, ValueError):
        return []


def padded(rewards: np.ndarray | None, samples: int) -> np.ndarray:
    """What ``read`` found of a prompt (None: nothing), as float64 [samples] with NaN for what is missing."""
    row = np.full(samples, math.nan)
    if rewards is not None:
        row[: len(rewards)] = rewards[:samples]
    return row


def is_complete(rewards: np.ndarray | None, samples: int) -> bool:
    """Whether what ``read`` found of a prompt (None: nothing) lacks none of so many rewards."""
    return not np.isnan(padded(rewards, samples)).any()


def other_rewards(store: RewardStore, *, own: bool) -> str:
    """What there is to say of a store without rewards for this run but with other runs'; empty where there is nothing.

    A store that the user named is expected to hold what the run needs: filling it anew instead, for hours and without
    a word, would hide that the model, the sampling or a reward is not what it was. Another seed alone is no mistake.

    Args:
        own: the store is the run's own, or the user asked for it to take new rewards.

    Raises:
        ConfigError: it is not, and more than the seed differs.
    """
    others = store.other_keys()
    if not others:
        return ""
    differences = store.key.nearest_differences(others)
    listing = "\n".join(f"  {difference}" for difference in differences)
    message = (
        f"algorithm.reference_store={store.path} holds reference rewards, but none for this run. The nearest of "
        f"{len(others)} differ in\n{listing}\n"
    )
    if own or all(difference.startswith("seed:") for difference in differences):
        return message + "This run's are drawn and stored beside them"
    raise ConfigError(
        message + "Restore what has changed; or name another file; or, if these are to be drawn and stored beside the "
        "others, do so by scripts/reference_rewards.py with the same settings"
    )
