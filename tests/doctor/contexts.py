"""Contexts of the doctor's checks, and programs and packages for them to find."""

from __future__ import annotations

from pathlib import Path

from nemo_aapo.doctor.catalog import CHECKS
from nemo_aapo.doctor.finding import Check, Context, Place
from nemo_aapo.doctor.guard import run_guarded

ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, host="here")


def context(config=None, place: Place = ALONE, token: str = "token") -> Context:
    return Context(config, place, port=0, token=token)


def rank(number: int, of: int) -> Place:
    return Place(number, of, number, of, f"host{number}")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def distribution(folder: Path, name: str, version: str) -> None:
    """What an installer leaves behind."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


def failure(name: str, config) -> str:
    """What a check says that fails."""
    (found,) = run_guarded(check(name), context(config))
    assert found.level == "failure", found
    return found.text
