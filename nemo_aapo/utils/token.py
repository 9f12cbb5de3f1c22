"""The bearer token that a trainer and its rollout servers share: a file that only this user can read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from nemo_aapo.utils.files import write_atomic

TOKEN_FILE = "token"
"""Its name in the servers' directory."""


def make_token(directory: Path) -> Path:
    """Make the token (0600) unless there is one; all who come at once get the same one. Returns its file.

    On a file system without hard links it is there empty for a moment, in which a reader refuses it.
    """
    path = directory / TOKEN_FILE
    if not path.exists():
        mine = directory / f".{TOKEN_FILE}.{secrets.token_hex(8)}"
        write_atomic(mine, secrets.token_urlsafe(32) + "\n", mode=0o600)
        try:
            os.link(mine, path)
        except FileExistsError:  # another one came first: its token stays
            pass
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), open(path, "xb", 0, opener=_private) as file:
                file.write(mine.read_bytes())
        finally:
            mine.unlink(missing_ok=True)
    return path


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)
