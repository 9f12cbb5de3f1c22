"""Fixtures that many tests share: worker ranks, tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import RankPool


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
