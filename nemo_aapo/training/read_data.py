"""The prompts of a run on all of its ranks: rank 0 reads and checks them, and only what names them crosses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.config import Config
from nemo_aapo.data.loading import attach_endless, load_data
from nemo_aapo.data.prepared.answers import AnswerCheck
from nemo_aapo.data.prepared.table import PreparedPrompts, copied_to, is_whole
from nemo_aapo.data.prompts import PromptSet
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree, on_first_rank
from nemo_aapo.errors import CheckpointError
from nemo_aapo.rewards.definition import source_digest
from nemo_aapo.rollout.collector import ChecksAnswers, Defined, RewardScorer
from nemo_aapo.run.names import CHECKPOINTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def read_data(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    scorer: RewardScorer | None,
    train: PromptSet | None = None,
    validation: PromptSet | None = None,
    note: Callable[[str], None] = logger.info,
) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts. Collective: all ranks get the same prompts, or the same error.

    Args:
        scorer: checks the gold answers, on rank 0.
        train, validation: prompts of one's own in place of those that the configuration names.
        note: told what takes long.
    """
    if train is not None and validation is not None:
        return train, validation
    run_dir = Path(config.run.dir)

    def load() -> tuple[PromptSet, PromptSet]:
        check = answer_check(scorer, config.reward_runner.workers, note)
        return load_data(config.data, tokenizer, check, train=train, held_out=validation, run_dir=run_dir, note=note)

    read, held_out = on_first_rank(load)
    read, held_out = seen_by_all(read, run_dir), seen_by_all(held_out, run_dir)
    if train is None:
        read = agree(lambda: attach_endless(read, config.data, tokenizer))
    return read, held_out


def answer_check(scorer: RewardScorer | None, workers: int, note: Callable[[str], None]) -> AnswerCheck | None:
    """The scorer's check of gold answers; None if it has none.

    Args:
        workers: processes among which a ``RewardRunner`` divides the work; any other scorer is asked in one thread.
    """
    if not isinstance(scorer, ChecksAnswers):
        return None
    divides = getattr(scorer, "pool", None) is not None
    defined = scorer.definition() if isinstance(scorer, Defined) else [{"source": source_digest(type(scorer))}]
    weightless = [{name: value for name, value in part.items() if name != "weight"} for part in defined]
    return AnswerCheck(scorer.check_answer, 2 * workers if divides else 1, weightless, note)


def seen_by_all(prompts: PromptSet, run_dir: Path) -> PromptSet:
    """The prompts; those in a file that a rank does not see are taken from a copy in the run directory. Collective."""
    views = prompts.prompts
    if not isinstance(views, PreparedPrompts) or not parallel.any_rank(not is_whole(views.path))[0]:
        return prompts
    copy = run_dir / "prepared" / views.path.name
    return on_first_rank(lambda: copied_to(prompts, copy))


def count(prompts: PromptSet) -> str:
    """How many prompts there are, in words."""
    endless = sum(size is None for size, _ in prompts.shares)
    finite = [str(len(prompts.prompts))] if len(prompts.prompts) else []
    return " + ".join([*finite, *["endless"] * endless])


def left_out(config: Config, prompts: PromptSet) -> str:
    """How many rows of the data are not among the prompts, and why; empty if all are."""
    counts = {
        "bad lines": prompts.bad_lines,
        "over the length limit": prompts.dropped_long,
        "duplicates": prompts.duplicates,
        "among the held-out ones": prompts.contaminated if config.data.on_contamination == "drop" else 0,
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f" (left out: {named})" if named else ""


def check_resumed_data(config: Config, sampler: PromptSampler) -> None:
    """Refuse to go on with other data than the newest checkpoint's, before the model is loaded. Collective.

    Raises:
        DataError: on all ranks; every difference is named.
    """

    def check() -> None:
        steps = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep_last=1, keep_best=None).steps()
        try:
            state = manifest.read(steps[-1]).trainer_state.get("sampler") if steps else None
        except CheckpointError:  # resuming says what is wrong with it, or goes back to an older one
            return
        if isinstance(state, dict):
            sampler.check(state)

    on_first_rank(check)
