"""Paths that people name: read as they mean them, and tried out before work begins whose end would be lost."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nemo_aapo.errors import ConfigError

EMPTY = "the path is empty, as that of an unset shell variable is; name one"


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
        ConfigError: it is a file, or what the system says of the nearest directory that is there.
    """
    place = path.absolute()
    try:
        place = next(above for above in (place, *place.parents) if above.exists())
        if not place.is_dir():
            raise ConfigError(f"{named}: {place} is a file, where a directory is needed")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"{named}: nothing can be written in {place} ({error.strerror})") from None


def require_file(path: Path, named: str) -> None:
    """Refuse a file that can't be written; one that is there may be replaced. Arguments and errors as above."""
    if path.is_dir():
        raise ConfigError(f"{named}: is a directory; name a file")
    require_directory(path.parent, named)


def require_new(path: Path, named: str) -> None:
    """Refuse a directory that is there already, or can't be made. Arguments and errors as above."""
    if path.exists():
        raise ConfigError(f"{named} exists already; name another directory, or remove it")
    require_directory(path, named)
