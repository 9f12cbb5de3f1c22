"""How the servers of a directory fare: each is asked for its metrics once. No torch and no numpy."""

from __future__ import annotations

import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.engines.remote.directory import ServerRecord, read_servers
from nemo_aapo.errors import ConfigError, WireError

ASK_S = 3.0
"""A server that has not answered within this is said not to."""
MIB = 2**20


@dataclass(frozen=True)
class ServerFigures:
    """What a server says of itself in ``GET /v1/metrics``; NaN where it does not know."""

    policy_version: float
    """Of the weights that it serves; NaN while it has none that are whole."""
    tokens: float
    """Completion tokens that it has sent since it started."""
    generate_seconds: float
    """Seconds that it has spent generating since then."""
    outstanding: float
    """Completions that it was asked for and has not drawn."""
    kv_cache_use: float
    refit_seconds: float
    refit_bytes: float
    failures: float
    """Answers and refits that failed since it started."""


def read_figures(text: str) -> ServerFigures:
    """The figures in a server's metrics, which are lines ``name{labels} value`` and comments.

    Raises:
        WireError: they are not a rollout server's.
    """
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition("{")[0].partition(" ")
        value = line.rpartition(" ")[2] if "{" in line else value
        if name and name != "#":
            try:
                sums[name] = sums.get(name, 0.0) + float(value)
            except ValueError:
                raise WireError(f"not a metric: {line[:80]!r}") from None
    try:
        return ServerFigures(
            policy_version=sums["rollout_policy_version"],
            tokens=sums["rollout_tokens_total"],
            generate_seconds=sums["rollout_generate_seconds"],
            outstanding=sums["rollout_outstanding_completions"],
            kv_cache_use=sums["rollout_kv_cache_use"],
            refit_seconds=sums["rollout_last_refit_seconds"],
            refit_bytes=sums["rollout_last_refit_bytes"],
            failures=sums.get("rollout_failures_total", 0.0),  # none has a reason yet
        )
    except KeyError as error:
        raise WireError(f"its metrics have no {error}: a server of another version") from None


def ask_all(directory: Path) -> dict[ServerRecord, ServerFigures | str]:
    """Each server that has announced itself -> its figures, or in words why there are none.

    Raises:
        ConfigError: a file in the directory is not what a server writes.
    """
    records: Sequence[ServerRecord] = read_servers(directory) if directory.is_dir() else ()
    if not records:
        return {}
    token = (directory / "token").read_text(encoding="ascii").strip()
    with ThreadPoolExecutor(min(len(records), 64)) as threads:
        return dict(zip(records, threads.map(lambda record: _ask(record, token), records), strict=True))


def fleet_lines(directory: Path) -> list[str]:
    """A line for each server that has announced itself; none where there are no servers.

    Example: ``server      0 http://node7:41001 policy version 12, 5,210 tokens/s, 64 outstanding, KV cache 41 %, last
    refit 2.1 s (14,526 MiB), 0 failures``

    Raises:
        ConfigError: as ``ask_all``.
    """
    return [
        f"server      {record.index} {record.address} {record.layout and f'{record.layout}, '}"
        f"{figures if isinstance(figures, str) else _said(figures)}"
        for record, figures in ask_all(directory).items()
    ]


def _said(of: ServerFigures) -> str:
    version = "loads its weights" if math.isnan(of.policy_version) else f"policy version {of.policy_version:.0f}"
    parts = [version]
    if of.generate_seconds:
        parts.append(f"{of.tokens / of.generate_seconds:,.0f} tokens/s")
    parts.append(f"{of.outstanding:.0f} outstanding")
    if not math.isnan(of.kv_cache_use):
        parts.append(f"KV cache {of.kv_cache_use:.0%}")
    if not math.isnan(of.refit_seconds):
        parts.append(f"last refit {of.refit_seconds:.1f} s ({of.refit_bytes / MIB:,.0f} MiB)")
    return ", ".join([*parts, f"{of.failures:.0f} failures"])


def _ask(record: ServerRecord, token: str) -> ServerFigures | str:
    request = urllib.request.Request(f"{record.address}/v1/metrics", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy has a part in this
    try:
        with opener.open(request, timeout=ASK_S) as answer:
            return read_figures(answer.read().decode())
    except urllib.error.HTTPError as error:
        return f"answers HTTP {error.code}"
    except (OSError, ValueError, WireError) as error:
        return f"does not answer ({getattr(error, 'reason', error) or type(error).__name__})"


class FleetWatch:
    """The servers' figures as metrics of a run.

    They are asked in the background, so that nobody waits for a server that hangs: a step's metrics are those of the
    last look that has ended, over the time since the one before.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._looks: list[tuple[float, dict[ServerRecord, ServerFigures | str]]] = []
        self._thread: threading.Thread | None = None

    def metrics(self) -> dict[str, float]:
        """What the last look found, as ``fleet_metrics``; empty before the second one. Begins the next look."""
        looks = self._looks[-2:]
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="fleet-watch", daemon=True)
            self._thread.start()
        if len(looks) < 2:
            return {}
        (before, old), (after, new) = looks
        return fleet_metrics(old, new, after - before)

    def _look(self) -> None:
        try:
            self._looks = [*self._looks[-1:], (time.monotonic(), ask_all(self.directory))]
        except (ConfigError, OSError):  # the fleet itself says what is wrong with the directory
            return


def fleet_metrics(
    before: Mapping[ServerRecord, ServerFigures | str], now: Mapping[ServerRecord, ServerFigures | str], seconds: float
) -> dict[str, float]:
    """Metrics of the servers that answered, from two looks.

    Returns:
        ``servers/answering``: how many did; ``servers/busy_fraction``: share of the time in which they generated;
        ``servers/tokens_per_second``: what they sent together; ``servers/outstanding``: completions that they were
        asked for and have not drawn, now; ``servers/policy_version``: the oldest that one serves;
        ``servers/kv_cache_use``: the fullest one's now;
        ``servers/refit_seconds``: the slowest one's last refit; ``servers/failures``: answers and refits that failed
        since their start. NaN where no server tells.
    """
    answered = {record: figures for record, figures in now.items() if isinstance(figures, ServerFigures)}
    told = [(old, new) for record, new in answered.items() if isinstance(old := before.get(record), ServerFigures)]
    busy = [(new.generate_seconds - old.generate_seconds) / seconds for old, new in told]
    return {
        "servers/answering": float(len(answered)),
        "servers/busy_fraction": sum(busy) / len(busy) if busy else math.nan,
        "servers/tokens_per_second": sum(new.tokens - old.tokens for old, new in told) / seconds,
        "servers/outstanding": sum(figures.outstanding for figures in answered.values()),
        "servers/policy_version": -_most(-figures.policy_version for figures in answered.values()),
        "servers/kv_cache_use": _most(figures.kv_cache_use for figures in answered.values()),
        "servers/refit_seconds": _most(figures.refit_seconds for figures in answered.values()),
        "servers/failures": sum(figures.failures for figures in answered.values()),
    }


def _most(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)
