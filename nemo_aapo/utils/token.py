"""The bearer token that a trainer and its rollout servers share: a file that only this user can read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.files import write_atomic

TOKEN_FILE = "token"
"""Its name in the servers' directory."""
WRITTEN_WITHIN_S = 2.0
"""Where a token is there before it is written, it is written at once; one that is empty for longer stays so."""


def make_token(directory: Path) -> Path:
    """Make the token (0600) unless there is one; all who come at once get the same one. Returns its file.

    On a file system without hard links it is there empty for a moment: a reader waits (``read_token``).
    """
    path = directory / TOKEN_FILE
    if not path.exists():
        mine = directory / f".{TOKEN_FILE}.{secrets.token_hex(8)}"
        token = secrets.token_urlsafe(32) + "\n"
        write_atomic(mine, token, mode=0o600)
        try:
            os.link(mine, path)
        except FileExistsError:  # another one came first: its token stays
            pass
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), open(path, "xb", 0, opener=_private) as file:
                file.write(token.encode())
        finally:
            mine.unlink(missing_ok=True)
    return path


def read_token(path: Path) -> str:
    """The token in a file that ``make_token`` made, or a person.

    Raises:
        ConfigError: no token, or none yet after ``WRITTEN_WITHIN_S``.
    """
    deadline = time.monotonic() + WRITTEN_WITHIN_S
    while not (token := path.read_text(encoding="ascii", errors="replace").strip()):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{path}: empty for {WRITTEN_WITHIN_S:g} s: whoever was to write the token was killed. End what uses "
                "this directory and remove the file: a new one is made"
            )
        time.sleep(0.05)
    if not re.fullmatch(r"[\w.~+/=-]{16,}", token, re.ASCII):
        raise ConfigError(f"{path}: not a token (at least 16 letters, digits, - or _). Remove it: a new one is made")
    return token


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)
