"""What the files that a configuration names tell before they are read: data sources, tokenizer, template. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from nemo_aapo.config.schema import Data
from nemo_aapo.config.sources import Source, sources_of
from nemo_aapo.data.records import check_source
from nemo_aapo.data.tokenizer import check_system_prompt, require_tokenizer_files
from nemo_aapo.errors import DataError

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def check_data(data: Data, given: Collection[str] = ()) -> None:
    """Refuse sources that are not there. Tasks of reasoning-gym and names on the hub are asked for later.

    Args:
        given: parts that the caller brings.

    Raises:
        DataError: the setting, the path, and what there is instead.
    """
    for key, source in named_sources(data, given):
        if source.task is None:
            try:
                check_source(source)
            except DataError as error:
                raise DataError(f"{key}: {error}") from None


def named_sources(data: Data, given: Collection[str]) -> Iterator[tuple[str, Source]]:
    """The sources of training and held-out prompts, each with its setting, but for the parts that a caller brings."""
    if "data" not in given:
        yield from (("data.train", source) for source in sources_of(data, "train"))
    if "validation_data" not in given:
        yield from (("data.validation", source) for source in sources_of(data, "validation"))


def check_tokenizer(model: str, data: Data) -> None:
    """Refuse a model directory without a tokenizer, and a system prompt that has no place or a place too many.

    Args:
        model: a Hugging Face directory.

    Raises:
        DataError: what to do.
    """
    require_tokenizer_files(Path(model))
    templated = data.chat_template == "auto" and has_chat_template(Path(model))
    check_system_prompt(data.system_prompt, data.prompt_template, templated)


def has_chat_template(directory: Path) -> bool:
    """Whether transformers will find a chat template beside the tokenizer."""
    if any((directory / name).exists() for name in _TEMPLATE_FILES):
        return True
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or for transformers to complain about
        return False
    return bool(settings.get("chat_template"))
