"""A tokenizer of characters, and rows as files."""

from __future__ import annotations

import json

import pytest

from nemo_aapo.data.tokenizer import load_tokenizer
from tests.tiny_models import save_character_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a character."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSONL."""

    def write_rows(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write_rows
