"""Files that runs share, each made once: where they lie, who makes them, and what happens where they can't be kept.

A file's name is a digest of all that it was made of, so it never changes: a run that finds it takes it as it is. It
appears whole, by a rename. What a kill has left half made is removed by whoever makes it next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemo_aapo.errors import RunError
from nemo_aapo.run.stop import heed
from nemo_aapo.utils.files import free_space, sync

CACHE_VARIABLE = "NEMO_AAPO_CACHE"
"""The environment variable that names the folder."""
LOCK_DEADLINE_S = 1200.0
"""How long to wait for another run that makes the same file. After that it is made twice, which does no harm."""
_POLL_S = 0.2

Note = Callable[[str], None]
"""Takes one line for people."""


def cache_folders(run_dir: Path | None) -> list[Path]:
    """Where shared files may lie, the first choice first: the user's cache, then the run directory."""
    named, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    folders = []
    with contextlib.suppress(RuntimeError):  # nobody's home
        folders.append(Path(named).expanduser() if named else Path(base or "~/.cache").expanduser() / "nemo_aapo")
    return [folder / "prompts" for folder in folders] + ([run_dir / "prepared"] if run_dir else [])


def cached(
    name: str, folders: Sequence[Path], is_whole: Callable[[Path], bool], make: Callable[[Path], Path], note: Note
) -> Path:
    """The file of that name: the first that is there, else made in the first folder that can hold it.

    Args:
        is_whole: whether a file can be used.
        make: given an empty folder, fills it and returns the file in it that is wanted.

    Raises:
        RunError: no folder can hold it.
    """
    for folder in folders:
        if is_whole(folder / name):
            with contextlib.suppress(OSError):
                os.utime(folder / name)  # so that what nobody uses any more can be told by its time
            return folder / name
    failures = []
    for folder in folders:
        try:
            return _made(folder / name, is_whole, make, note)
        except OSError as error:
            failures.append(f"{folder}: {error} ({free_space(folder.parent)})")
            note(f"prepared prompts can't be kept in {failures[-1]}")
    raise RunError(
        f"no place for the prepared prompts: {'; '.join(failures)}. Name a folder with room for them: "
        f"{CACHE_VARIABLE}=FOLDER"
    )


def _made(path: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], Path], note: Note) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock"), note) as alone:
        if is_whole(path):  # by another run, meanwhile
            return path
        partial = path.with_name(f".{path.name}{'' if alone else f'.{os.uname().nodename}.{os.getpid()}'}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            made = make(partial)
            sync(made)
            os.replace(made, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


@contextlib.contextmanager
def _locked(path: Path, note: Note) -> Iterator[bool]:
    """Inside, no other process makes the same file. False: one may, as the deadline is over or there are no locks."""
    with path.open("w") as file:
        deadline, told = time.monotonic() + LOCK_DEADLINE_S, False
        alone = _try_lock(file.fileno())
        while alone is False and time.monotonic() < deadline:
            if not told:
                note(f"waiting for another run that prepares the same prompts ({path.parent})")
                told = True
            heed("another run that prepares the same prompts")
            time.sleep(_POLL_S)
            alone = _try_lock(file.fileno())
        yield bool(alone)  # closing the file ends the lock, as does the end of the process


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was got; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
