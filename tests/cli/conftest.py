"""What the tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aapo.utils import unforeseen


@pytest.fixture
def unforeseen_fails(monkeypatch) -> None:
    """What would be said to be unforeseen fails the test instead, with the error."""

    def fail(error: Exception, run_dir: Path | None, rank: int = 0) -> str:
        raise AssertionError(f"{type(error).__name__}: {error}") from error

    monkeypatch.setattr(unforeseen, "describe", fail)
