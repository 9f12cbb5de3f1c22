"""The training and held-out prompts that a configuration names: sources read, joined, and compared with each other."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.config import Config
from nemo_aapo.config.schema import Data
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.config.sources import Source, sources_of
from nemo_aapo.data.contamination import overlap
from nemo_aapo.data.gym import GymPrompts, PromptsWithoutEnd, take_all
from nemo_aapo.data.prepared.answers import AnswerCheck
from nemo_aapo.data.prepared.making import Making, are_large, prepared_overlap, prepared_prompts, without_rows
from nemo_aapo.data.prepared.table import PreparedPrompts
from nemo_aapo.data.prompts import PromptSet, digest_of, load_prompts
from nemo_aapo.data.records import check_source
from nemo_aapo.data.rows import HELD_OUT_SPLITS, TRAIN_SPLITS
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.data.tokenizer import render_prompts
from nemo_aapo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_aapo.types import Prompt

logger = logging.getLogger(__name__)

_EXAMPLES = 3


def load_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    check: AnswerCheck | None = None,
    *,
    train: PromptSet | None = None,
    held_out: PromptSet | None = None,
    run_dir: Path | None = None,
    note: Callable[[str], None] = logger.info,
) -> tuple[PromptSet, PromptSet]:
    """The training prompts, those of sources without end still left out, and the held-out ones.

    Prompts of large sources are views of a file that is made once (``prepared.making``).

    Args:
        check: of the gold answers; None: they are taken as they are.
        train, held_out: prompts of your own in place of those that ``data`` names.
        run_dir: where prepared prompts go that the user's cache can't hold.
        note: told what takes long.

    Raises:
        DataError: what can't be read or used; training prompts among the held-out ones where that is an error.
    """
    making = Making(data, tokenizer, _rendering(data), check, run_dir, note)
    if held_out is None:
        held_out = _load_all(sources_of(data, "validation"), HELD_OUT_SPLITS, making)
    if train is None:
        read = _load_all(sources_of(data, "train"), TRAIN_SPLITS, making)
        train = without_contamination(read, held_out, making)
    return train, held_out


def _load_all(sources: Sequence[Source], splits: Sequence[str], making: Making) -> PromptSet:
    for source in sources:
        if source.task is None:
            check_source(source)
    if are_large(sources, splits):
        return prepared_prompts(sources, splits, making)
    return join(sources, [_load(source, splits, making) for source in sources])


def attach_endless(prompts: PromptSet, data: Data, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts with those of the sources that have no end, which every rank makes by itself."""
    endless = {k: _gym(s, data, tokenizer) for k, s in enumerate(sources_of(data, "train")) if s.endless}
    if not endless:
        return prompts
    digest = digest_of([prompts.digest, *(gym.digest for gym in endless.values())])
    sizes = [size for size, _ in prompts.shares]
    return dataclasses.replace(prompts, prompts=PromptsWithoutEnd(prompts.prompts, endless, sizes), digest=digest)


def build_sampler(config: Config, prompts: PromptSet) -> PromptSampler:
    """The order in which a run takes its prompts."""
    endless = any(size is None for size, _ in prompts.shares)
    return PromptSampler(
        None if endless else len(prompts.prompts),
        prompts_drawn(config),
        config.seed,
        config.data.shuffle,
        data_digest=prompts.digest,
        sampling=config.data.sampling,
        shares=prompts.shares,
    )


def _load(source: Source, splits: Sequence[str], making: Making) -> PromptSet | None:
    """The prompts of one source; None if it has no end."""
    data = making.data
    if source.task is not None:
        if source.size is None:
            return None
        gym = _gym(source, data, making.tokenizer)
        try:
            return take_all(gym, source.size)
        finally:
            gym.close()
    return load_prompts(
        source,
        making.tokenizer,
        default_splits=splits,
        max_prompt_tokens=data.max_prompt_tokens,
        on_bad_line=data.on_bad_line,
        on_long_prompt=data.on_long_prompt,
        verify_answer=making.check,
        **making.rendering,
    )


def _gym(source: Source, data: Data, tokenizer: PreTrainedTokenizerBase) -> GymPrompts:
    render = functools.partial(render_prompts, tokenizer, **_rendering(data))
    return GymPrompts(source, render, data.max_prompt_tokens, data.on_long_prompt == "drop")


def _rendering(data: Data) -> dict[str, Any]:
    """The settings by which ``tokenizer.render_prompts`` turns a question into a prompt."""
    names = ("system_prompt", "chat_template", "prompt_template", "template_arguments", "date")
    return {name: getattr(data, name) for name in names}


def join(sources: Sequence[Source], parts: Sequence[PromptSet | None]) -> PromptSet:
    """One set of several; a prompt that an earlier part has is dropped from the later one.

    Args:
        parts: the prompts of each source; None for one without end.

    Raises:
        DataError: a source adds nothing to those before it.
    """
    seen: dict[str, tuple[Prompt, str]] = {}
    shares: list[tuple[int | None, float]] = []
    for source, part in zip(sources, parts, strict=True):
        before = len(seen)
        for prompt, question in zip(part.prompts, part.questions, strict=True) if part else ():
            seen.setdefault(prompt.id, (prompt, question))
        if part and len(seen) == before:
            raise DataError(f"{part.path}: all its prompts are in the sources before it; leave it out")
        shares.append((len(seen) - before if part else None, source.weight))
    there = [part for part in parts if part is not None]
    repeated = sum(len(part.prompts) for part in there) - len(seen)
    return PromptSet(
        tuple(prompt for prompt, _ in seen.values()),
        " + ".join(source.path for source in sources),
        bad_lines=sum(part.bad_lines for part in there),
        dropped_long=sum(part.dropped_long for part in there),
        duplicates=sum(part.duplicates for part in there) + repeated,
        digest=digest_of(seen),
        questions=tuple(question for _, question in seen.values()),
        shares=tuple(shares),
    )


def without_contamination(train: PromptSet, held_out: PromptSet, making: Making) -> PromptSet:
    """The training prompts, without those that are held-out ones by normalised text where these are dropped.

    Raises:
        DataError: there are some and that is an error (``data.on_contamination``), or nothing is left.
    """
    action = making.data.on_contamination
    if isinstance(train.prompts, PreparedPrompts):
        found = prepared_overlap(train, held_out.questions, making)
    else:
        found = overlap(train.questions, held_out.questions)
    if not found:
        return train
    examples = "; ".join(f"{train.prompts[i].source}: {train.questions[i][:80]!r}" for i in list(found)[:_EXAMPLES])
    what = f"{len(found)} of {len(train.prompts)} training prompts are among the held-out ones of {held_out.path}"
    if action == "error":
        raise DataError(f"{what}, such as {examples}. Take them out, or set data.on_contamination=drop")
    logger.warning("%s%s, such as %s", what, " and are left out" if action == "drop" else "", examples)
    return _without(train, set(found)) if action == "drop" else dataclasses.replace(train, contaminated=len(found))


def _without(train: PromptSet, indices: set[int]) -> PromptSet:
    shares: list[tuple[int | None, float]] = []
    start = 0
    for size, weight in train.shares:
        if size is not None:
            left = size - sum(start <= i < start + size for i in indices)
            start += size
            if left == 0:
                raise DataError(f"{train.path}: no prompts: all of a source are among the held-out ones")
            shares.append((left, weight))
        else:
            shares.append((None, weight))
    prompts: Sequence[Prompt]
    questions: Sequence[str]
    if isinstance(train.prompts, PreparedPrompts):
        prompts, questions, digest = without_rows(train, indices)
    else:
        kept = [i for i in range(len(train.prompts)) if i not in indices]
        prompts, questions = tuple(train.prompts[i] for i in kept), tuple(train.questions[i] for i in kept)
        digest = digest_of(prompt.id for prompt in prompts)
    return dataclasses.replace(
        train,
        prompts=prompts,
        questions=questions,
        digest=digest,
        contaminated=len(indices),
        shares=tuple(shares),
    )
