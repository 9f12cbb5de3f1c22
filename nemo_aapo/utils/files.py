"""Files and directories that are whole or not there, paths that people name, and JSON that any reader takes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_aapo.errors import ConfigError, RunError, first_line

T = TypeVar("T")
logger = logging.getLogger(__name__)

FINISHED = "finished"
"""Name of the file in the run directory that says that the run is complete; its JSON sums the run up."""
LOCK = ".lock"
"""Name of the file in the run directory that the process which writes there holds locked."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What locking fails with where a file system is mounted without locks, as some of clusters are."""
EMPTY = "the path is empty, as that of an unset shell variable is; name one"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def write_atomic(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a whole file or none: a reader, or a run that starts after a crash, never sees half of it.

    Args:
        content: text is written as UTF-8.
        mode: permissions of the new file, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- directories


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a whole directory or none.

    Inside, an empty directory beside ``path`` is filled. At the end it is brought to the disk and takes the place of
    ``path``: a kill at any moment leaves the old directory or the new one under that name, and an error leaves the old
    one. One process writes at a time; what a kill has left half written is removed by the next write.

        with whole_directory(Path("hf_model")) as partial:
            (partial / "config.json").write_text("{}")
    """
    partial = begin_directory(path)
    try:
        yield partial
        commit_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(path: Path) -> Path:
    """The hidden name beside ``path`` under which that directory is written."""
    return path.with_name(f".{path.name}.partial")


def begin_directory(path: Path, mode: int = 0o777) -> Path:
    """The first half of ``whole_directory``, for writers of several processes: make the empty partial directory.

    Args:
        mode: permissions of the directory, less the umask.
    """
    partial, aside = partial_of(path), _aside_of(path)
    if aside.exists() and not path.exists():  # killed between the two renames of ``_replace``
        os.rename(aside, path)
    for left in (partial, aside):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir(mode=mode, parents=True)
    return partial


def commit_directory(partial: Path, path: Path) -> None:
    """The second half: bring all of ``partial`` to the disk, and put it in the place of ``path``.

    Raises:
        OSError: it can't be written or renamed; ``path`` is as it was.
    """
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    try:
        os.rename(partial, path)  # takes the place of an empty directory too
    except OSError:
        if not path.is_dir() or path.is_symlink():
            raise
        _replace(path, partial)
    sync(path.parent)


def _replace(old: Path, new: Path) -> None:
    """Put a directory in the place of another one, which is removed.

    A file system that can't exchange two names in one call (NFS, Lustre) needs two renames. A kill between them leaves
    no directory of that name, but both whole beside it; the next write gives the old one its name back.
    """
    doomed = new
    if not _exchange(old, new):
        doomed = _aside_of(old)
        try:
            os.rename(old, doomed)
            os.rename(new, old)
        except BaseException:
            if not old.exists():
                os.rename(doomed, old)
            raise
    sync(old.parent)
    shutil.rmtree(doomed, ignore_errors=True)  # what can't be removed now, the next write removes


def _aside_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one system call (Linux); False where that can't be done."""
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove_directory(path: Path) -> None:
    """Remove a directory, of which no half ever bears its name. That it can't be removed is only logged."""
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.removing")
    try:
        if path.exists():
            os.rename(path, doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("can't remove %s: %s", path, error)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's entries (new and renamed files), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(path: Path) -> str:
    """The free space of the file system that holds ``path``, for messages: ``1,024 MiB free``."""
    try:
        return f"{shutil.disk_usage(path).free / 2**20:,.0f} MiB free"
    except OSError as error:
        return f"free space unknown: {error}"


def bytes_of(directory: Path) -> int:
    """Of all files in it; 0 if it is being removed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return 0


# ---------------------------------------------------------------- paths that people name


def expanded(text: str, named: str) -> str:
    """The path with the home directory for a ``~`` that it begins with.

    Args:
        named: the setting or option that it is the value of.

    Raises:
        ConfigError: it is empty.
    """
    if not text.strip():
        raise ConfigError(f"{named}: {EMPTY}")
    return os.path.expanduser(text)


def require_directory(path: Path, named: str) -> None:
    """Refuse a directory that can't be made, or in which nothing can be written. Leaves nothing behind.

    Args:
        named: the setting or option with the path, as it was typed.

    Raises:
        ConfigError: it is a file or a link that leads nowhere, or what the system says of the nearest directory that
            is there.
    """
    place = path.absolute()
    try:
        place = next(above for above in (place, *place.parents) if os.path.lexists(above))
        require_followed(place, named)
        if not place.is_dir():
            raise ConfigError(f"{named}: {place} is a file, where a directory is needed")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"{named}: nothing can be written in {place} ({error.strerror})") from None


def require_followed(path: Path, named: str) -> None:
    """Refuse a link that leads nowhere, as one to a scratch disk that was purged: nothing can be made in its place.

    Args:
        named: as above.

    Raises:
        ConfigError: it is one.
    """
    if path.is_symlink() and not os.path.exists(path):
        raise ConfigError(
            f"{named}: {path} is a link to {os.readlink(path)}, which is not there. Remove it, or make what it leads to"
        )


def require_file(path: Path, named: str) -> None:
    """Refuse a file that can't be written; one that is there may be replaced. Arguments and errors as above."""
    if path.is_dir():
        raise ConfigError(f"{named}: is a directory; name a file")
    require_directory(path.parent, named)


def require_new(path: Path, named: str) -> None:
    """Refuse a directory that is there already, or can't be made. Arguments and errors as above."""
    if os.path.lexists(path):
        raise ConfigError(f"{named} exists already; name another directory, or remove it")
    require_directory(path, named)


# ---------------------------------------------------------------- JSON


def to_json(value: object) -> str:
    """One line of strict JSON: numpy becomes plain, and what is not finite becomes null (``NaN`` is no JSON).

    Half a surrogate pair, which UTF-8 has no code for, becomes an escape of JSON that reads back as it was.
    """
    text = json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def read_json(path: Path, read: Callable[[Any], T], failure: type[ConfigError | RunError], remedy: str) -> T | None:
    """What a JSON file that we have written holds; None if there is none.

    Args:
        read: makes something of the parsed file; ValueError, TypeError, KeyError or AttributeError: it is not ours.
        failure: what a damaged file, or one that can't be read, is raised as.
        remedy: what to do then.

    Raises:
        ConfigError, RunError: ``failure``, which names the file and what is wrong with it.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise failure(f"{path}: can't be read ({error.strerror}). {remedy}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise failure(f"{path}: damaged ({type(error).__name__}: {first_line(error)}). {remedy}") from None


def fitting(value: Any, *kinds: type) -> Any:
    """The value, which is of one of these types.

    Raises:
        TypeError: it is not; for ``read_json``.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:40]!r} where {' or '.join(kind.__name__ for kind in kinds)} is needed")
    return value


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
