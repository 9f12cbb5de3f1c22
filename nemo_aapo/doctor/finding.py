"""What a check found, and what it is told about the place it runs in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_aapo.config import Config

Level = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    level: Level
    text: str
    """What was seen."""
    remedy: str = ""
    """What to do about it; empty where nothing is wrong, or where ``text`` says it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this process is."""

    rank: int
    world_size: int
    local_rank: int
    """Among the ranks of this machine."""
    local_world_size: int
    host: str


@dataclass(frozen=True, slots=True)
class Context:
    """What a check gets."""

    config: Config | None
    """None: only the machine is looked at."""
    place: Place
    port: int
    """A free TCP port of rank 0's machine, the same on all ranks and another one for each check."""
    token: str
    """A word that no other check, run or earlier doctor has; the same on all ranks."""


@dataclass(frozen=True, slots=True)
class Check:
    """One entry of the catalogue."""

    name: str
    run: Callable[[Context], Finding | Sequence[Finding]]
    deadline_s: float
    """A check that is not done by then is a failure."""
    needs_config: bool = False
    on: Literal["first", "node", "rank"] = "first"
    """Where it runs: on rank 0, on one rank of each machine, on all ranks."""
    together: bool = False
    """Its ranks wait for each other: it can't do without any of them."""
    after: tuple[str, ...] = ()
    """Checks that it builds on: where one of them failed, it would only fail again, or hang."""
    quick: bool = False
    """Seconds at most, and nothing that would disturb a run on the same machine: fit for a health check."""

    def concerns(self, place: Place) -> bool:
        """Whether this rank runs it."""
        return self.on == "rank" or (place.local_rank == 0 if self.on == "node" else place.rank == 0)
