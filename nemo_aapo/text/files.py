"""What the tokenizer's files say: settings, special tokens, ids, and what is put around a text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nemo_aapo.errors import DataError
from nemo_aapo.utils.files import fitting, read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's directory; empty where there is no such file.

    Raises:
        DataError: it can't be read, or holds something else, as a file that was half written.
    """
    remedy = "Half-written? Take the file that came with the model"
    return read_json(path, lambda tree: fitting(tree, dict), DataError, remedy) or {}


def _tokenizer(directory: Path) -> dict[str, Any]:
    """``tokenizer.json``, parsed once: a large one has 10 MB, which take a third of a second."""
    path = directory / TOKENIZER
    return _parsed(path, path.stat().st_mtime_ns) if path.is_file() else {}


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    return read_settings(path)


def special_tokens(directory: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like -> the token's text, for those that the files name."""
    settings = read_settings(directory / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in settings:  # transformers reads the older file only then
        settings |= read_settings(directory / "special_tokens_map.json")
    named = {name: settings.get(name) for name in _SPECIAL}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def token_ids(directory: Path) -> dict[str, int]:
    """Token -> id, added tokens too; empty where no file of a known form lists them (``tokenizer.model`` alone)."""
    whole = _tokenizer(directory)
    vocabulary = whole.get("model", {}).get("vocab") or read_settings(directory / "vocab.json")
    if isinstance(vocabulary, list):  # Unigram: [token, log-prob] by id
        vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
    if not vocabulary:
        return {}
    decoder = read_settings(directory / TOKENIZER_CONFIG).get("added_tokens_decoder", {})
    return {
        **vocabulary,
        **{token["content"]: token["id"] for token in whole.get("added_tokens", ())},
        **{token["content"]: int(number) for number, token in decoder.items()},
    }


def check_vocabulary(directory: Path, vocab_size: int, ids: dict[str, int] | None = None) -> None:
    """Refuse a tokenizer that may give ids for which the model has no row.

    Padding is not asked for: no text becomes it, and no engine is fed with it. Rows without a token are common.

    Args:
        directory: of the model, or of its base.
        vocab_size: rows of the model's embedding.
        ids: token -> id; None: as the files list them.

    Raises:
        DataError: both numbers, and the remedy.
    """
    ids = token_ids(directory) if ids is None else ids
    padding = special_tokens(directory).get("pad_token")
    beyond = {number: token for token, number in ids.items() if number >= vocab_size and token != padding}
    if beyond:
        first = min(beyond)
        raise DataError(
            f"{directory}: the tokenizer has {len(ids)} tokens with ids up to {max(beyond)}, the model's vocabulary "
            f"{vocab_size} rows: there is none for {beyond[first]!r} ({first}). Take the tokenizer that came with "
            "these weights, or weights whose embedding was extended with it"
        )


def appended_token(directory: Path) -> str | None:
    """What the tokenizer puts behind each plain text by itself, by its files; None: nothing."""
    settings = read_settings(directory / TOKENIZER_CONFIG)
    if settings.get("add_eos_token") is True:
        return special_tokens(directory).get("eos_token")
    return _appended(_tokenizer(directory).get("post_processor"))


def _appended(processor: Any) -> str | None:
    if not isinstance(processor, dict):
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        return next(filter(None, map(_appended, processor.get("processors", ()))), None)
    if kind == "TemplateProcessing":
        last = (processor.get("single") or [{}])[-1]
        return last["SpecialToken"]["id"] if "SpecialToken" in last else None
    return processor["sep"][0] if kind in ("BertProcessing", "RobertaProcessing") else None


def refuse_appended(token: str, where: object) -> None:
    """Raise the DataError of a tokenizer that puts a token behind each plain text."""
    raise DataError(
        f"{where}: the tokenizer puts {token} behind every plain text, so each prompt would end before it is answered; "
        f'set "add_eos_token" to false in {TOKENIZER_CONFIG}, and take it out of "post_processor" in {TOKENIZER}'
    )
