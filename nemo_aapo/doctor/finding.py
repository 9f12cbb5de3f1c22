"""The records of the doctor: a check, its context, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_aapo.config import Config

Level = Literal["ok", "warning", "failure", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Example:
        ``Finding("gpu", "warning", "none here, though torch is built for CUDA 12.8", remedy="pass --gpus to docker")``
    """

    name: str
    level: Level
    text: str
    """The observation."""
    remedy: str = ""
    """What to do about it; empty if nothing is wrong or ``text`` says it."""


@dataclass(frozen=True, slots=True)
class Place:
    """The rank of this process, in the job and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this rank among those of this machine, from 0."""
    local_world_size: int
    """Number of ranks on this machine."""
    host: str


@dataclass(frozen=True, slots=True)
class Context:
    """The input of a check."""

    config: Config | None
    """The configuration of the run; None: only the machine is checked."""
    place: Place
    port: int
    """A free TCP port of rank 0's machine, the same on all ranks and another one for each check."""
    token: str
    """A unique word, the same on all ranks: no other check, run or earlier doctor has it."""

    @property
    def run_config(self) -> Config:
        """``config`` for checks that need one; the frame skips them without it (``Check.needs_config``)."""
        assert self.config is not None, "a check that needs a configuration must say so: needs_config=True"
        return self.config


@dataclass(frozen=True, slots=True)
class Check:
    """One check, as the catalogue lists it."""

    name: str
    run: Callable[[Context], Finding | Sequence[Finding]]
    deadline_s: float
    """Seconds after which an unfinished check is killed and counts as a failure."""
    needs_config: bool = False
    """True: the check is skipped where there is no configuration."""
    on: Literal["first", "node", "rank"] = "first"
    """The ranks that run it: rank 0, one rank of each machine, or all ranks."""
    together: bool = False
    """True: its ranks wait for each other, so that it is skipped if one is missing."""
    after: tuple[str, ...] = ()
    """Names of the checks that it builds on: if one of them failed, it is skipped, as it would fail or hang too."""
    quick: bool = False
    """True: it takes seconds at most and does not disturb a run on the same machine, so it can be a health check."""

    def concerns(self, place: Place) -> bool:
        """Whether this rank runs it."""
        return self.on == "rank" or (place.local_rank == 0 if self.on == "node" else place.rank == 0)
