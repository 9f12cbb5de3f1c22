"""Loading a tokenizer, and turning questions into the token ids that an engine is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from nemo_aapo.errors import DataError
from nemo_aapo.utils.libraries import importing
from nemo_aapo.utils.transformers5 import tokenizer_arguments, tokenizer_class

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
        require_tokenizer_files(directory)
        path = str(directory)
    with importing():
        loader = tokenizer_class(directory)
    try:
        return loader.from_pretrained(path, trust_remote_code=trust_remote_code, **tokenizer_arguments(directory))
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        hint = " Set trust_remote_code=true only after reading that code." if "trust_remote_code" in str(error) else ""
        raise DataError(f"{path}: transformers can't load a tokenizer from here: {error}{hint}") from error


def require_tokenizer_files(directory: Path) -> None:
    """Raise DataError unless the directory is there and holds a tokenizer, by the names of its files."""
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


QUESTION, SYSTEM = "{question}", "{system_prompt}"
"""Placeholders in a prompt template."""


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
    prompt_template: str = QUESTION,
    before: Sequence[Sequence[dict[str, str]]] | None = None,
) -> tuple[list[str], list[np.ndarray]]:
    """The text and the token ids that an engine gets for each question.

    With a chat template, its text is tokenised as it stands, since the template writes the special tokens itself.
    Plain text gets those that the tokenizer adds by itself, such as a leading begin-of-sequence token.

    Args:
        prompt_template: the user's message with ``{question}`` in it; without a chat template the whole text, where
            ``{system_prompt}`` may stand, too.
        before: chat messages before each question.

    Returns:
        The rendered texts and their token ids, int32 [P_i] each.

    Raises:
        DataError: a system prompt without a place to put it, a place without a system prompt, chat messages without a
            chat template, a template that refuses the messages, or an unknown ``chat_template``.
    """
    if chat_template not in get_args(ChatTemplate):
        raise DataError(f"chat_template must be one of {', '.join(get_args(ChatTemplate))}, not {chat_template!r}")
    templated = chat_template == "auto" and bool(tokenizer.chat_template)
    check_system_prompt(system_prompt, prompt_template, templated)
    before = before or [()] * len(questions)
    if not templated and any(before):
        raise DataError(
            "prompts hold several chat messages, which only a chat template can render (the tokenizer has none, or "
            "chat_template is 'none'); name one message, as in data.prompt_field=prompt.0.content"
        )
    filled = prompt_template.replace(SYSTEM, system_prompt or "")
    said = [filled.replace(QUESTION, question) for question in questions]
    texts = _apply_template(tokenizer, said, system_prompt, before) if templated else said
    encoded = tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False, verbose=False)
    return texts, [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def check_system_prompt(system_prompt: str | None, prompt_template: str, templated: bool) -> None:
    """Refuse a system prompt without a place, and a place without one.

    Args:
        templated: a chat template renders the prompts.

    Raises:
        DataError: what to leave out, or where to put it.
    """
    place = SYSTEM in prompt_template
    if templated and place:
        raise DataError(
            f"prompt_template holds {SYSTEM}, but the tokenizer's chat template has a place for the system prompt; "
            "leave it out, or set chat_template to 'none'"
        )
    if system_prompt is not None and not templated and not place:
        raise DataError(
            "system_prompt is set, but prompts are rendered as plain text, which has no place for it "
            "(the tokenizer has no chat template, or chat_template is 'none'); unset it, or write "
            f"{SYSTEM} into prompt_template"
        )
    if system_prompt is None and place:
        raise DataError(f"prompt_template holds {SYSTEM}, but system_prompt is not set")


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[str],
    system_prompt: str | None,
    before: Sequence[Sequence[dict[str, str]]],
) -> list[str]:
    from jinja2 import TemplateError

    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if system and any(message["role"] == "system" for messages in before for message in messages):
        raise DataError("system_prompt is set, but prompts bring a system message of their own; unset it")
    chats = [
        [*system, *messages, {"role": "user", "content": text}] for messages, text in zip(before, said, strict=True)
    ]
    try:
        return [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
    except TemplateError as error:
        raise DataError(
            f"the tokenizer's chat template refuses the messages: {error}; unset system_prompt if it is the system "
            "role that is refused, or set chat_template to 'none'"
        ) from error


def text_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[np.ndarray], str]:
    """A function token ids -> text, without special tokens and with the tokens' own spaces."""

    def decode(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode
