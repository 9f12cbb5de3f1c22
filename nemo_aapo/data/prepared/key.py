"""What prepared prompts depend on, as a digest: the files' bytes, tokenizer, settings, code and rewards."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.config.sources import Source
from nemo_aapo.data.formats.hub import data_set
from nemo_aapo.data.prepared.table import FORMAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 1 << 20
_FIELDS = ("prompt_field", "answer_field", "answer_form", "subset", "split")
_CODE = ("data", "rewards", "text")
"""Parts of the package whose code decides what becomes of a row."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def files_of(source: Source, default_splits: Sequence[str]) -> list[Path]:
    """The files that hold a source's rows."""
    path = Path(source.path)
    if source.on_hub:
        return [Path(file["filename"]) for file in data_set(source, default_splits).cache_files]
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def digest_of_files(files: Sequence[Path]) -> str:
    """A digest of the files' bytes, in their order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does with text: its own state where it tells, and the files that it came from."""
    parts: list[Any] = [type(tokenizer).__qualname__, tokenizer.chat_template, repr(tokenizer.special_tokens_map)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts.append(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()))
    if tokenizer.name_or_path and Path(tokenizer.name_or_path).is_dir():
        files = Path(tokenizer.name_or_path).glob("*token*")  # tokenizer.model, and code of its own
        parts.append(digest_of_files(sorted(file for file in files if file.is_file())))
    return key_of(parts)


@functools.cache
def digest_of_code() -> str:
    """A digest of this package's own rules, and the versions of the libraries that render and tokenise."""
    package = Path(__file__).parents[2]
    files = sorted(file for part in _CODE for file in (package / part).rglob("*.py"))
    versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    return key_of([digest_of_files(files), *versions])


def key_of_prompts(
    sources: Sequence[Source],
    default_splits: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    rewards: Any,
) -> str:
    """The name of the prepared prompts of some sources.

    Args:
        settings: how rows are rendered (``rendering``), and what is refused or left out.
        rewards: definitions of those that gold answers are checked by.
    """
    data = [
        [digest_of_files(files_of(source, default_splits)), *(getattr(source, name) for name in _FIELDS)]
        for source in sources
    ]
    parts = [data, list(default_splits), digest_of_tokenizer(tokenizer), dict(settings), rewards]
    return key_of([FORMAT, digest_of_code(), *parts])


def key_of(parts: Any) -> str:
    """A digest of plain values: 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
