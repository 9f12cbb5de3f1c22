"""The completed and scored prompts of one step, and what is known of them besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import RolloutStats
from nemo_aapo.rollout.unscored import Score, Tally
from nemo_aapo.run.experiment import rollout_rows
from nemo_aapo.types import Completion, Group, Prompt

Keep = Callable[[Prompt, Sequence[Completion]], None]
Found = Mapping[int, Sequence[Completion]]


class Banking(TypedDict, total=False):
    """What was generated before, and who keeps what is."""

    found: Found
    """By index among all prompts: completions that are scored, and not generated again."""
    keep: Keep
    """Told on the model-parallel source rank of each prompt whose completions have all ended, perhaps in a thread."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRollout:
    """The completed and scored prompts of one step."""

    groups: list[Group]
    """This data-parallel rank's, in the order of its prompts."""
    lengths: Sequence[tuple[str, float]]
    """(prompt id, mean tokens of its completions) of all ranks, in the order of the prompts."""
    tally: Tally = field(default_factory=Tally)
    """Over all ranks: how many completions were scored; empty where a checkpoint held them."""
    metrics: dict[str, float] = field(default_factory=lambda: engine_metrics([]))
    """Over all ranks: see ``engine_metrics``; NaN where a checkpoint held them."""


def rows_of_all_ranks(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Once each completion of the groups of all ranks, in rank order, for people; empty but on rank 0. Collective.

    Args:
        groups: this rank's. Those from a checkpoint have their texts on all ranks of a model-parallel group.
    """
    mine = rollout_rows(groups) if parallel.is_model_parallel_source() else []
    return [row for part in parallel.gather_on_first_rank(mine) for row in part]


def mean_lengths(groups: Sequence[Group]) -> list[tuple[str, float]]:
    """(prompt id, mean tokens of its completions) of each group that has some."""
    return [
        (group.prompt.id, float(np.mean([len(completion.token_ids) for completion in group.completions])))
        for group in groups
        if group.completions
    ]


def engine_metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """What the rollout cost.

    Args:
        stats: one for each data-parallel rank.

    Returns:
        ``rollout/idle_fraction``: share of the engines' rows that stood empty, averaged over their steps; NaN where an
        engine can't tell. ``rollout/tokens_per_second``: completion tokens over the slowest engine's seconds.
        ``rollout/acceptance_rate``: share of the engines' drafts that were accepted; NaN where there were none.
        ``rollout/accepted_fraction``: share of the completions' tokens that were accepted drafts.
    """
    steps, seconds = sum(stat.steps for stat in stats), max((stat.seconds for stat in stats), default=math.nan)
    idle = sum(stat.idle_fraction * stat.steps for stat in stats)
    tokens, drafted, accepted = (sum(getattr(stat, n) for stat in stats) for n in ("tokens", "drafted", "accepted"))
    return {
        "rollout/idle_fraction": idle / steps if steps else math.nan,
        "rollout/tokens_per_second": tokens / seconds,
        "rollout/acceptance_rate": accepted / drafted if drafted else math.nan,
        "rollout/accepted_fraction": accepted / tokens if tokens else math.nan,
    }


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one prompt's completions, [G] each."""

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray


def scores_of(scores: Mapping[Hashable, Score], counts: Sequence[int]) -> list[Scores]:
    """Of the first ``counts[i]`` completions of each prompt i."""
    found = []
    for i, count in enumerate(counts):
        judged = [scores[i, j] for j in range(count)]
        names = list(judged[0].parts) if judged else []
        found.append(
            Scores(
                rewards=np.array([np.nan if score.failure else score.score for score in judged], dtype=np.float64),
                parts={n: np.array([score.parts[n] for score in judged], dtype=np.float64) for n in names},
                failed=np.array([score.failure is not None for score in judged], dtype=bool),
            )
        )
    return found
