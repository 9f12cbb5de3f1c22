"""The bank of a run: completions of finished groups, on the disk as they come, for a run that goes on after a kill.

    RUN/bank/manifest.json         which run's they are
    RUN/bank/step_000007_1.bank    those of step 7 (from 0) by data-parallel rank 1: one record behind the other
    RUN/bank/step_000009.json      in flight: which groups step 9 trained on

    record = 8 bytes length | 16 bytes BLAKE2b of the content | content (``pending.pack``)

A record is written when the last completion of its group has ended, and is on the disk within ``SYNC_S``. A kill can
leave a torn one behind the others: it is cut off. Rewards are not among it; they are scored again. As seeds decide
tokens, a bank saves time and changes no result; what can't be written to it costs that time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from nemo_aapo.errors import RunError
from nemo_aapo.rollout.buffer import Key
from nemo_aapo.rollout.saved import pending
from nemo_aapo.run.names import step_name, step_of
from nemo_aapo.types import Completion, Group, Prompt
from nemo_aapo.utils.files import free_space, to_json, write_atomic

FOLDER, MANIFEST, ENDING = "bank", "manifest.json", ".bank"
FORMAT = 1
SYNC_S = 1.0
"""Seconds after which a record is on the disk at the latest."""
LENGTH_BYTES, DIGEST_BYTES = 8, 16


class RolloutBank:
    """One process's side; those that have nothing to write may be without."""

    def __init__(self, directory: Path, run: Sequence[str], rank: int, note: Callable[[str], None]) -> None:
        """Touch no file.

        Args:
            directory: of the bank.
            run: digests of what decides the run's results: the first is written, a bank with none of them refused.
            rank: data-parallel.
            note: takes a line for people.
        """
        self.directory, self.run, self.rank, self.note = directory, tuple(run), rank, note
        self._files: dict[int, int] = {}  # step -> descriptor
        self._lock = threading.Lock()
        self._sync_at: threading.Timer | None = None
        self._broken = False

    # ------------------------------------------------------------------ what was there before

    def recover(self) -> dict[int, list[bytes]]:
        """The records of all ranks by step, after torn ones were cut off. For one process, before others write.

        Raises:
            RunError: the bank belongs to another run, or can't be read.
        """
        try:
            self._claim()
            found: dict[int, list[bytes]] = {}
            for path in sorted(self.directory.glob(f"*{ENDING}")):
                if (step := step_of(path.stem.rpartition("_")[0])) is not None:
                    found.setdefault(step, []).extend(_whole_records(path))
            return found
        except OSError as error:
            raise RunError(f"{self.directory}: the bank of rollouts can't be read ({error}). {REMEDY}") from error

    def taken(self) -> dict[int, list[Key]]:
        """The groups that steps were trained on, as far as it is known. For one process."""
        found = {}
        for path in self.directory.glob("*.json"):
            if (step := step_of(path.stem)) is not None:
                found[step] = [(int(of), int(i)) for of, i in json.loads(path.read_bytes())]
        return found

    def keep_only(self, records: Mapping[int, Sequence[bytes]], taken_before: int) -> None:
        """Leave these records by step, and the choices of earlier steps. For one process, before others write.

        They are written before the others go: a kill in between loses none. Those that can't be written are lost, as
        in ``add``.

        Raises:
            RunError: the others can't be removed: a later start would take them for this one's.
        """
        kept = set[Path]()
        try:
            for step, contents in records.items():
                path = self.directory / f"{step_name(step)}_0{ENDING}"
                write_atomic(path, b"".join(map(_record, contents)))
                kept.add(path)
        except OSError as error:
            self._end(error)
        try:
            for path in [*self.directory.glob(f"*{ENDING}"), *self.directory.glob("*.json")]:
                of_step = step_of(path.stem.rpartition("_")[0] if path.suffix == ENDING else path.stem)
                if of_step is not None and path not in kept and (path.suffix == ENDING or of_step >= taken_before):
                    path.unlink()
        except OSError as error:
            raise RunError(f"{self.directory}: outdated rollouts can't be removed ({error}). {REMEDY}") from error

    def _claim(self) -> None:
        path = self.directory / MANIFEST
        if path.exists():
            try:
                says = json.loads(path.read_bytes())
                known = says["format"] == FORMAT and says["run"] in self.run
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise RunError(f"{path}: these are the rollouts of another run, or of another version. {REMEDY}")
        else:
            write_atomic(path, to_json({"format": FORMAT, "run": self.run[0]}))

    # ------------------------------------------------------------------ while the run goes on

    def add(self, step: int, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Write a finished group. Any thread may call; an error of the file system is said once and ends the bank."""
        nothing = np.zeros(len(completions))
        group = Group(prompt, tuple(completions), (), nothing, {}, nothing.astype(bool))
        record = _record(pending.pack([group]))
        with self._lock:
            if self._broken:
                return
            try:
                if step not in self._files:
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                    self._files[step] = os.open(self._path(step), flags, 0o600)
                written = os.write(self._files[step], record)
                if written < len(record):
                    raise OSError(f"only {written} of {len(record)} bytes were written")
            except OSError as error:
                return self._end(error)
            if self._sync_at is None:
                self._sync_at = threading.Timer(SYNC_S, self.sync)
                self._sync_at.daemon = True
                self._sync_at.start()

    def took(self, step: int, keys: Sequence[Key]) -> None:
        """Write which groups a step is trained on, before it is; for rank 0. Errors are treated as in ``add``."""
        try:
            if not self._broken:
                write_atomic(self.directory / f"{step_name(step)}.json", to_json(keys))
        except OSError as error:
            self._end(error)

    def sync(self) -> None:
        """Bring all records to the disk. A slow disk keeps nobody waiting who adds some meanwhile."""
        with self._lock:
            self._sync_at = None
            descriptors = [os.dup(descriptor) for descriptor in self._files.values()]
        for descriptor in descriptors:
            try:
                os.fsync(descriptor)
            except OSError as error:
                self._end(error)
            finally:
                os.close(descriptor)

    def _end(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            self.note(
                f"warning: {self.directory}: rollouts can't be kept for a resumed run any more ({error}; "
                f"{free_space(self.directory)}); the run goes on, and a kill costs what is being generated"
            )

    def remove(self) -> None:
        """The run is complete: nothing of it will be needed again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
        if self.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def forget(self, before: int, taken_before: int = 0) -> None:
        """The records of earlier steps, and of what steps trained on, are not needed: a checkpoint covers them.

        Errors are treated as in ``add``: what stays is passed over by whoever goes on from that checkpoint.
        """
        with self._lock:
            for covered in [step for step in self._files if step < before]:
                os.close(self._files.pop(covered))
        if self.rank == 0:
            try:
                for path in self.directory.glob(f"*{ENDING}"):
                    step = step_of(path.stem.rpartition("_")[0])
                    if step is not None and step < before:
                        path.unlink(missing_ok=True)
                for path in self.directory.glob("*.json"):
                    if (step := step_of(path.stem)) is not None and step < taken_before:
                        path.unlink(missing_ok=True)
            except OSError as error:
                self._end(error)

    def _path(self, step: int) -> Path:
        return self.directory / f"{step_name(step)}_{self.rank}{ENDING}"


REMEDY = "Remove that folder, which costs what was generated since the last checkpoint, or start with rollout.bank=off"


def completions_of(
    records: Sequence[bytes], prompts: Sequence[Prompt], version: int | None, count: int
) -> dict[int, tuple[Completion, ...]]:
    """What records hold of a step's prompts, by the prompt's index.

    Args:
        version: of the policy that draws the step: completions of any other are passed over; None: in flight, no one.
        count: completions of a group.
    """
    places = {prompt.id: i for i, prompt in enumerate(prompts)}
    found: dict[int, tuple[Completion, ...]] = {}
    for content in records:
        (name,) = pending.prompt_ids(content)
        if (place := places.get(name)) is not None:
            (group,) = pending.unpack(content, [prompts[place]])
            alike = version is None or all(c.policy_version == version for c in group.completions)
            if len(group.completions) == count and alike:
                found[place] = group.completions
    return found


def _whole_records(path: Path) -> Iterator[bytes]:
    """The records of a file up to the first that is not whole, behind which nothing is; that is cut off."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        begin = start + LENGTH_BYTES + DIGEST_BYTES
        end = begin + int.from_bytes(content[start : start + LENGTH_BYTES], "little")
        if end > len(content) or _digest(content[begin:end]) != content[start + LENGTH_BYTES : begin]:
            os.truncate(path, start)
            return
        yield content[begin:end]
        start = end


def _record(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "little") + _digest(content) + content


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
