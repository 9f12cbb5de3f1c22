"""Loading a tokenizer, and turning questions into the token ids that an engine is fed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from nemo_aapo.errors import DataError
from nemo_aapo.text.chat_template import ChatTemplate as Template
from nemo_aapo.text.chat_template import default_of
from nemo_aapo.text.checks import QUESTION, SYSTEM, prepared_template
from nemo_aapo.text.end_tokens import end_tokens
from nemo_aapo.text.files import check_vocabulary, refuse_appended
from nemo_aapo.text.transformers5 import tokenizer_arguments, tokenizer_class
from nemo_aapo.utils.libraries import importing

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
    directory = Path(os.path.expanduser(path))
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


@dataclass(frozen=True)
class ModelText:
    """A model's tokenizer, and what tells its answers from what only surrounds them."""

    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    """Sampling one of these ends a completion (``text.end_tokens``); the tokenizer's own first."""

    def decode(self, token_ids: np.ndarray) -> str:
        """Token ids [T] -> the text that rewards and people see, with the tokens' own spaces.

        Padding and the token that ended the completion are no text. Other special tokens are: tags that a reward looks
        for may be such.
        """
        ended = len(token_ids) > 0 and int(token_ids[-1]) in self.end_tokens
        kept = [int(token) for token in token_ids[: len(token_ids) - ended] if token != self.tokenizer.pad_token_id]
        return self.tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )

    def __str__(self) -> str:
        """What ends completions, for people: ``<|im_end|> (151645), <|endoftext|> (151643)``."""
        return ", ".join(f"{self.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in self.end_tokens)


def load_text(path: str, vocab_size: int, *, trust_remote_code: bool = False) -> ModelText:
    """The tokenizer of a model directory with the model's end tokens.

    Args:
        path: the model's Hugging Face directory.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: as ``load_tokenizer``, ``end_tokens``, ``check_vocabulary``.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(Path(path), vocab_size, tokenizer.get_vocab())
    return ModelText(tokenizer, end_tokens(Path(path), tokenizer.eos_token_id, vocab_size))


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    system_prompt: str | None = None,
    chat_template: ChatTemplate = "auto",
    prompt_template: str = QUESTION,
    template_arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
    before: Sequence[Sequence[dict[str, str]]] | None = None,
) -> tuple[list[str], list[np.ndarray]]:
    """The text and the token ids that an engine gets for each question.

    With a chat template, its text is tokenised as it stands, since the template writes the special tokens itself.
    Plain text gets those that the tokenizer adds by itself, such as a leading begin-of-sequence token.

    Args:
        prompt_template: the user's message with ``{question}`` in it; without a chat template the whole text, where
            ``{system_prompt}`` may stand, too.
        template_arguments: what the chat template reads besides the messages, such as ``{"enable_thinking": False}``.
        date: the day that a chat template writes, ``YYYY-MM-DD``; None: today.
        before: chat messages before each question.

    Returns:
        The rendered texts and their token ids, int32 [P_i] each.

    Raises:
        DataError: a system prompt without a place to put it, a place without a system prompt, chat messages without a
            chat template, a template that refuses the messages or loses them, a tokenizer that ends each prompt, or an
            unknown ``chat_template``.
    """
    if chat_template not in get_args(ChatTemplate):
        raise DataError(f"chat_template must be one of {', '.join(get_args(ChatTemplate))}, not {chat_template!r}")
    template = own_template(tokenizer) if chat_template == "auto" else None
    template = prepared_template(template, system_prompt, prompt_template, template_arguments, date)
    before = before or [()] * len(questions)
    if template is None and any(before):
        raise DataError(
            "prompts hold several chat messages, which only a chat template can render (the tokenizer has none, or "
            "chat_template is 'none'); name one message, as in data.prompt_field=prompt.0.content"
        )
    filled = prompt_template.replace(SYSTEM, system_prompt or "")
    said = [filled.replace(QUESTION, question) for question in questions]
    if template is None:
        _refuse_appending(tokenizer)
    texts = said if template is None else _apply_template(template, said, system_prompt, before)
    encoded = tokenizer(texts, add_special_tokens=template is None, return_attention_mask=False, verbose=False)
    return texts, [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _apply_template(
    template: Template, said: Sequence[str], system_prompt: str | None, before: Sequence[Sequence[dict[str, str]]]
) -> list[str]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if system and any(message["role"] == "system" for messages in before for message in messages):
        raise DataError("system_prompt is set, but prompts bring a system message of their own; unset it")
    return [
        template.render([*system, *messages, {"role": "user", "content": text}])
        for messages, text in zip(before, said, strict=True)
    ]


def own_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's chat template; None where it has none."""
    where = tokenizer.name_or_path or type(tokenizer).__name__
    source = default_of(tokenizer.chat_template, where)
    return None if source is None else Template(source, where, tokenizer.special_tokens_map)


def _refuse_appending(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that puts something behind plain text by itself."""
    bare, whole = (tokenizer("1", add_special_tokens=special)["input_ids"] for special in (False, True))
    if bare and whole[-1] != bare[-1]:
        refuse_appended(tokenizer.convert_ids_to_tokens(whole[-1]), tokenizer.name_or_path)
