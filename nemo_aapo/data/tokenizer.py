"""Loading a tokenizer, and turning questions into the token ids that an engine is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from nemo_aapo.data import DataError
from nemo_aapo.libraries import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "none"]
"""``"auto"``: the tokenizer's own template if it has one, else plain text. ``"none"``: plain text."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, or of a model on the Hugging Face hub.

    Args:
        path: a directory, or a hub name such as ``org/model``, which is passed on to transformers as it is.
        trust_remote_code: let transformers run Python code that comes with the tokenizer.

    Raises:
        DataError: no such directory, no tokenizer in it, or transformers can't load what is there.
    """
    directory = Path(path).expanduser()
    if directory.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        _require_tokenizer_files(directory)
        path = str(directory)
    with importing():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        hint = " Set trust_remote_code=true only after reading that code." if "trust_remote_code" in str(error) else ""
        raise DataError(f"{path}: transformers can't load a tokenizer from here: {error}{hint}") from error


def _require_tokenizer_files(directory: Path) -> None:
    if not directory.exists():
        raise DataError(f"{directory}: no such tokenizer directory; give a directory, or a hub name such as org/model")
    if not directory.is_dir():
        raise DataError(f"{directory}: this is a file; give the directory that holds it")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(
            f"{directory}: no tokenizer here (none of {', '.join(_TOKENIZER_FILES)}); "
            "copy the tokenizer's files beside the weights, or name another directory"
        )


def require_eos(tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The id of the end-of-sequence token, without which no completion ever ends by itself.

    Args:
        tokenizer: any transformers tokenizer.
        where: the tokenizer's path or config key, for the message.

    Raises:
        DataError: the tokenizer names no such token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{where}: the tokenizer has no end-of-sequence token, so every completion would run to the length limit; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return int(tokenizer.eos_token_id)


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
) -> tuple[list[str], list[np.ndarray]]:
    """What an engine is fed for each question.

    With a chat template, its text is tokenised as it stands, since the template writes the special tokens itself.
    Plain text gets those that the tokenizer adds by itself, such as a leading begin-of-sequence token.

    Returns:
        The rendered texts and their token ids, int32 [P_i] each.

    Raises:
        DataError: a system prompt without a template to put it in, a template that refuses the messages, or an
            unknown ``chat_template``.
    """
    if chat_template not in get_args(ChatTemplate):
        raise DataError(f"chat_template must be one of {', '.join(get_args(ChatTemplate))}, not {chat_template!r}")
    templated = chat_template == "auto" and bool(tokenizer.chat_template)
    if system_prompt is not None and not templated:
        raise DataError(
            "system_prompt is set, but prompts are rendered as plain text, which has no place for it "
            "(the tokenizer has no chat template, or chat_template is 'none'); unset it, or write it into the prompts"
        )
    texts = _apply_template(tokenizer, questions, system_prompt) if templated else list(questions)
    encoded = tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False, verbose=False)
    return texts, [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], system_prompt: str | None
) -> list[str]:
    from jinja2 import TemplateError

    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    chats = [[*system, {"role": "user", "content": question}] for question in questions]
    try:
        return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    except TemplateError as error:
        raise DataError(
            f"the tokenizer's chat template refuses the messages: {error}; unset system_prompt if it is the system "
            "role that is refused, or set chat_template to 'none'"
        ) from error


def text_decoder(tokenizer: Any) -> Callable[[np.ndarray], str]:
    """Token ids -> text, without special tokens and exactly as the tokens say it."""

    def decode(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode
