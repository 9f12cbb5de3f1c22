"""How the servers of a directory fare, for people: each is asked once. No torch and no numpy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_aapo.engines.remote.directory import ServerRecord, read_servers

ASK_S = 3.0
"""A server that has not answered within this is said not to."""


def fleet_lines(directory: Path) -> list[str]:
    """A line for each server that has announced itself; none where there are no servers.

    Example: ``server      0 http://node7:41001 policy version 12``

    Raises:
        ConfigError: a file in the directory is not what a server writes.
    """
    records: Sequence[ServerRecord] = read_servers(directory) if directory.is_dir() else ()
    if not records:
        return []
    token = (directory / "token").read_text(encoding="ascii").strip()
    with ThreadPoolExecutor(min(len(records), 64)) as threads:
        states = list(threads.map(lambda record: _state(record, token), records))
    return [
        f"server      {r.index} {r.address} {f'{r.layout}, ' if r.layout else ''}{state}"
        for r, state in zip(records, states, strict=True)
    ]


def _state(record: ServerRecord, token: str) -> str:
    """What ``GET /v1/ready`` says; wire.py has its form."""
    request = urllib.request.Request(f"{record.address}/v1/ready", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy has a part in this
    try:
        with opener.open(request, timeout=ASK_S) as answer:
            return f"policy version {json.load(answer)['policy_version']}"
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return "loads its weights"
        return f"answers HTTP {error.code}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"does not answer ({getattr(error, 'reason', error) or type(error).__name__})"
