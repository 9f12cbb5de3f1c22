"""Training on the rollouts that another run kept: no engine, no rewards, the same updates.

With ``rollout.keep_groups=all rollout.keep_tokens=true`` a run keeps all that its learner was given. ``rollout.replay``
names such a run, and the learner is given it again: losses are the same to the bit, and an update can be debugged on a
machine that could not generate.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from nemo_aapo.config import Config
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.errors import RunError
from nemo_aapo.rollout.saved.kept import ROWS, TOKENS
from nemo_aapo.rollout.scored import engine_metrics
from nemo_aapo.rollout.spread import own_shard
from nemo_aapo.run.names import ROLLOUTS, kept_name
from nemo_aapo.types import Completion, Group, Prompt

REMEDY = "Replay a run that was made with rollout.keep_groups=all rollout.keep_tokens=true and room in keep_bytes"


class ReplayedRollouts:
    """What a ``RolloutPipeline`` is to the loop, from files."""

    runs_ahead = False

    def __init__(self, config: Config, prompts: Sequence[Prompt], sampler: PromptSampler) -> None:
        """
        Args:
            prompts: the training prompts, which are those of the run that is replayed.
            sampler: says which of them each step takes.
        """
        self.config, self.data, self.sampler = config, prompts, sampler
        self.directory = Path(str(config.rollout.replay))
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "refit"), 0.0)
        self.metrics = engine_metrics([])

    def generate(self, step: int) -> list[Group]:
        """This rank's groups of a step (from 0), as the run had them.

        Raises:
            RunError: the step was not kept whole, or its prompts are others than this run's.
        """
        prompts = [self.data[i] for i in self.sampler.indices(step)]
        groups = read_kept(self.directory, step + 1, prompts)
        self.sampler.step = step + 1
        return groups[own_shard(len(prompts))]

    def fill_reference(self, step: int, report: Callable[[int, int], None], stop_requested: Callable[[], bool]) -> bool:
        """The reference rewards were kept with the groups."""
        return not stop_requested()

    def begin(self, step: int) -> None:
        """Nothing runs ahead."""

    def settle(self) -> None:
        """Nothing is under way."""

    def refit(self) -> None:
        """There is no engine."""

    def epochs(self, step: int) -> float:
        """How often the steps before this one took each prompt, on average."""
        return self.sampler.epochs(step)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's part of a checkpoint."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.sampler.load_state_dict(state["sampler"])

    def pending_files(self) -> dict[str, bytes]:
        """Nothing is pending."""
        return {}

    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Nothing was pending."""

    def drawn_later(self) -> str:
        """Nothing is drawn."""
        return ""

    def recover(self) -> None:
        """There is no bank."""

    def parity_sample(self) -> None:
        """There is no engine: the learner is compared with the completions that it kept."""

    def checkpointed(self, step: int) -> None:
        """There is no bank."""


class NoValidation:
    """Without an engine nothing can be measured; the checks of the configuration want no validation."""

    prompts: Sequence[Prompt] = ()

    def run(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Never called."""
        raise RuntimeError("a replayed run has no engine that could be validated")


def read_kept(run: Path, step: int, prompts: Sequence[Prompt]) -> list[Group]:
    """All groups of a training step (from 1) that a run kept with their tokens, equal to the bit.

    Args:
        prompts: of that step, in their order.

    Raises:
        RunError: they are not all there, were made of other prompts, or are damaged.
    """
    path = run / ROLLOUTS / f"{kept_name(step)}{ROWS}"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        tokens = load(path.with_suffix(TOKENS).read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{error.filename}: not there. {REMEDY}") from None
    except Exception as error:  # safetensors raises its own
        raise RunError(f"{path}: can't be read ({type(error).__name__}). {REMEDY}") from None
    groups = [
        list(part) for _, part in itertools.groupby(zip(rows, _completions(rows, tokens), strict=True), _group_of)
    ]
    if [part[0][0]["prompt_id"] for part in groups] != [prompt.id for prompt in prompts]:
        raise RunError(
            f"{path}: holds {len(groups)} groups of other prompts than the {len(prompts)} of this run's step {step}. "
            f"Model, data, seed and prompts_per_step have to be those of the run that is replayed. {REMEDY}"
        )
    return [_group(prompt, part) for prompt, part in zip(prompts, groups, strict=True)]


def _group_of(pair: tuple[dict[str, Any], Completion]) -> int:
    return int(pair[0]["group"])


def _completions(rows: Sequence[dict[str, Any]], tokens: dict[str, np.ndarray]) -> Iterator[Completion]:
    bounds = np.cumsum(tokens["lengths"])[:-1]
    parts = (np.split(tokens[name], bounds) for name in ("token_ids", "logprobs"))
    for row, ids, logprobs in zip(rows, *parts, strict=True):
        parts = row.get("versions")
        versions = None if parts is None else np.repeat(*np.array(parts, np.int32).T)
        yield Completion(ids, logprobs, row["finish_reason"], row["policy_version"], versions=versions)


def _group(prompt: Prompt, members: Sequence[tuple[dict[str, Any], Completion]]) -> Group:
    rows = [row for row, _ in members]
    references = rows[0]["reference_rewards"]
    return Group(
        prompt=prompt,
        completions=tuple(completion for _, completion in members),
        texts=tuple(row["completion"] for row in rows),
        rewards=_numbers([row["reward"] for row in rows]),
        reward_parts={name: _numbers([row["reward_parts"][name] for row in rows]) for name in rows[0]["reward_parts"]},
        failed=np.array([row["failed"] for row in rows], dtype=bool),
        reference_rewards=None if references is None else _numbers(references),
    )


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """float64, NaN for what JSON has as null."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
