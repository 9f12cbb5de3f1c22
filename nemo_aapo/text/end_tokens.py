"""Which tokens end a completion: one rule for training, validation, evaluation, reference rewards and every engine.

The tokenizer's end-of-sequence token, and those that ``generation_config.json`` names (without one: ``config.json``),
which is where transformers, vLLM and TensorRT-LLM stop as well. A chat model often ends its turns with another token
than its tokenizer's. One that pads as well, as Qwen's ``<|endoftext|>``, still ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_aapo.errors import DataError
from nemo_aapo.text.files import read_settings, special_tokens

GENERATION_CONFIG = "generation_config.json"


def stated(directory: Path) -> tuple[str, Any]:
    """The file that names end tokens by ``eos_token_id``, and what it says.

    Raises:
        DataError: it can't be read, or is no JSON object.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        if (directory / name).is_file():
            return name, read_settings(directory / name).get("eos_token_id")
    return GENERATION_CONFIG, None


def stated_end_tokens(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that a model's files name, in their order of size; empty where they name none.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: as ``stated``; no integers, or ids that the model can't generate.
    """
    name, said = stated(directory)
    ids = [] if said is None else said if isinstance(said, list) else [said]
    for number in ids:
        if type(number) is not int:
            raise DataError(f"{directory / name}: eos_token_id={said!r}: an id or a list of ids is needed")
        if not 0 <= number < vocab_size:
            raise DataError(
                f"{directory / name}: eos_token_id names {number}, but the model's vocabulary has {vocab_size} rows; "
                "name the tokens that end its answers"
            )
    return tuple(sorted(set(ids)))


def end_tokens(directory: Path, eos: int | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a completion, the tokenizer's first.

    Args:
        directory: the model's Hugging Face directory.
        eos: of the tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: there is none at all, or the model can't generate one.
    """
    if eos is not None and eos >= vocab_size:
        raise DataError(f"{directory}: the tokenizer's end token has the id {eos}, the model {vocab_size} rows")
    ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stated_end_tokens(directory, vocab_size)]))
    if not ids:
        raise DataError(
            f"{directory}: the tokenizer has no end-of-sequence token and {GENERATION_CONFIG} names none, so every "
            'completion would run to the length limit; set "eos_token" in tokenizer_config.json'
        )
    return ids


def what_ends(directory: Path) -> Any:
    """What the files say of end tokens, for the identity of a run: another answer is another run.

    Raises:
        DataError: one of them is damaged.
    """
    return [special_tokens(directory).get("eos_token"), stated(directory)[1]]
