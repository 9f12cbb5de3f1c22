"""How a job speaks to its model: tokenizer, chat template and end tokens tried out, the date decided. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_aapo.config import Config, EvaluationConfig
from nemo_aapo.conversion.source import ModelSource
from nemo_aapo.data.tokenizer import require_tokenizer_files
from nemo_aapo.evaluation.prompts import template_text
from nemo_aapo.evaluation.records import IDENTITY, read_identity
from nemo_aapo.reference_store.shards import shard_files
from nemo_aapo.reference_store.store import keys_of
from nemo_aapo.run.directory import read_record
from nemo_aapo.text import chat_template
from nemo_aapo.text.chat_template import ChatTemplate, read_chat_template
from nemo_aapo.text.checks import prepared_template
from nemo_aapo.text.end_tokens import stated_end_tokens
from nemo_aapo.text.files import appended_token, check_vocabulary, refuse_appended


def check_tokenizer(model: Path, vocab_size: int) -> None:
    """Refuse a model directory without a tokenizer, or with one that gives ids which the model lacks.

    Raises:
        DataError: what to do.
    """
    require_tokenizer_files(model)
    check_vocabulary(model, vocab_size)
    stated_end_tokens(model, vocab_size)


def with_date(config: Config, vocab_size: int) -> Config:
    """The configuration with the day that its prompts write, after all is tried that the model's text files allow.

    The day is kept with the run: a resumed run, one that reads a filled store and the filling itself render alike. Null
    where the chat template writes none.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: tokenizer, template or end tokens that can't be used, and what to do.
    """
    check_tokenizer(Path(config.model.path), vocab_size)
    data = config.data
    template = _template(
        Path(config.model.path), data.chat_template, data.system_prompt, data.prompt_template, data.template_arguments
    )
    date = data.date or _kept_date(config) or chat_template.today() if template and template.writes_date else None
    return dataclasses.replace(config, data=dataclasses.replace(data, date=date))


def with_evaluation_date(config: EvaluationConfig, source: ModelSource, vocab_size: int) -> EvaluationConfig:
    """The same of an evaluation. A run's model is shown the day that it was trained with.

    Raises:
        DataError: as ``with_date``.
        ConfigError: the record of the evaluation that was begun there is damaged.
    """
    check_tokenizer(source.base, vocab_size)
    around = template_text(config.prompt_template)
    template = _template(source.base, config.chat_template, config.system_prompt, around, config.template_arguments)
    if not (template and template.writes_date):
        return dataclasses.replace(config, date=None)
    directory = Path(config.run.dir)
    begun = read_identity(directory).get("date") if (directory / IDENTITY).exists() else None
    run = source.run or source.path.parent  # a run's export lies in its directory
    return dataclasses.replace(config, date=config.date or begun or _date_of_run(run) or chat_template.today())


def _template(
    model: Path, kind: str, system_prompt: str | None, prompt_template: str, arguments: dict[str, object] | None
) -> ChatTemplate | None:
    found = read_chat_template(model) if kind == "auto" else None
    template = prepared_template(found, system_prompt, prompt_template, arguments, None)
    if template is None and (token := appended_token(model)):
        refuse_appended(token, model)
    return template


def _kept_date(config: Config) -> str | None:
    """The day of the run's first start, or of the rewards in its reference store."""
    return _date_of_run(Path(config.run.dir)) or _date_of_store(config.algorithm.reference_store)


def _date_of_run(directory: Path) -> str | None:
    record = read_record(directory)
    return record.get("settings", {}).get("data", {}).get("date") if record else None


def _date_of_store(store: str | None) -> str | None:
    """The latest day in the store or in parts of it that are still to be merged."""
    files = [] if store is None else [Path(store), *shard_files(store)]
    return max((parts["date"] for file in files for parts in keys_of(file) if parts.get("date")), default=None)
