"""What all tests share: worker ranks, tiny models, and the tier that each test belongs to."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pool import RankPool

TIERS = ("unit", "ranks", "slow", "slurm", "peers", "gpu")
TIER_OF_FOLDER = {"gpu": "gpu", "launch/slurm": "slurm", "peers": "peers"}
TIERS_OF_TESTS = pytest.StashKey[dict[str, list[str]]]()
"""The tiers of every collected test by its id, also of those that ``-m`` and ``-k`` leave out."""
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test the tier that follows from where it lies and from what it uses."""
    for item in items:
        folder = item.path.relative_to(TESTS).parent.as_posix()
        if tier := TIER_OF_FOLDER.get(folder) or _tier_by_use(item):
            item.add_marker(tier)
    config.stash[TIERS_OF_TESTS] = {item.nodeid: tiers(item) for item in items}


def tiers(item: pytest.Item) -> list[str]:
    """All tiers that a test is marked with; it should be one."""
    return sorted({mark.name for mark in item.iter_markers()} & set(TIERS))


def _tier_by_use(item: pytest.Item) -> str | None:
    """None: the test says so itself."""
    if tiers(item):
        return None
    return "ranks" if "ranks" in getattr(item, "fixturenames", ()) else "unit"


@pytest.fixture(autouse=True)
def unit_tests_start_no_process(request, monkeypatch):
    """Neither one of their own nor a group of ranks: that is what keeps them quick. Wider fixtures are not watched."""
    if tiers(request.node) != ["unit"]:
        return

    def refuse(*arguments: object, **more: object) -> None:
        pytest.fail("a unit test started a process: use the fixture `ranks`, or mark the test as slow")

    for name in ("fork", "forkpty", "posix_spawn", "system"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    if "torch.distributed" in sys.modules:
        monkeypatch.setattr("torch.distributed.init_process_group", refuse)


@pytest.fixture(scope="session")
def ranks():
    """The session's worker ranks; see ``tests/pool.py``."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Random tiny Hugging Face models by name, with a character tokenizer."""
    from tests.tiny_models import make_tiny_models

    return make_tiny_models(tmp_path_factory.mktemp("models"))
