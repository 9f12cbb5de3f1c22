"""Generate completions and judge them: the one way for validation in training and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.rollout.collector import Collector
from nemo_aapo.rollout.unscored import ScoringWatch
from nemo_aapo.types import Group, Prompt, SamplingSpec


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Judged completions of some prompts."""

    correct: list[np.ndarray]
    """float64 [samples] for each prompt, over all ranks: 1 right, 0 wrong, NaN not judged, as its scoring failed."""
    lengths: list[np.ndarray]
    """int64 [samples] for each prompt, completion tokens, over all ranks."""
    groups: list[Group]
    """The groups of this data-parallel rank's prompts; their texts are on model-parallel source ranks only."""
    complete: bool
    """False: a stop was asked for meanwhile, and some completions are missing; the same on all ranks."""


def measure(
    collector: Collector,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    seeds: Sequence[Sequence[int]],
    reward: str,
    watch: ScoringWatch,
    what: str,
    stop: Callable[[], bool] = bool,
) -> Outcomes:
    """Generate ``len(seeds[i])`` completions of each prompt i and judge them. Collective over all ranks of the job.

    Args:
        prompts, sampling, seeds: as ``Collector.collect`` takes them.
        reward: name of the reward that tells right (1) from wrong completions.
        watch: looks whether the completions can be judged at all.
        what: what is measured, for its message.
        stop: asked meanwhile, on every rank; True on one: what has not ended is broken off.

    Raises:
        RewardError: on all ranks; they can't.
    """
    groups = collector.collect(prompts, sampling, seeds, watch=lambda ended: stop())
    watch.check(collector.tally, what, asked=sum(map(len, seeds)))
    mine = [
        (
            group.right(reward) if group.completions else np.zeros(0),
            np.array([len(completion.token_ids) for completion in group.completions], dtype=np.int64),
        )
        for group in groups
    ]
    everyone = [row for part in parallel.gather_data_parallel(mine) for row in part]
    correct, lengths = [correct for correct, _ in everyone], [lengths for _, lengths in everyone]
    return Outcomes(correct, lengths, groups, list(map(len, lengths)) == list(map(len, seeds)))
