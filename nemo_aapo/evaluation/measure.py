"""Generate completions and judge them: the one way for validation in training and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
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


def measure(
    collector: Collector,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    seeds: Sequence[Sequence[int]],
    reward: str,
    watch: ScoringWatch,
    what: str,
) -> Outcomes:
    """Generate ``len(seeds[i])`` completions of each prompt i and judge them. Collective over all ranks of the job.

    Args:
        prompts, sampling, seeds: as ``Collector.collect`` takes them.
        reward: name of the reward that tells right (1) from wrong completions.
        watch: looks whether the completions can be judged at all.
        what: what is measured, for its message.

    Raises:
        RewardError: on all ranks; they can't.
    """
    groups = collector.collect(prompts, sampling, seeds)
    watch.check(collector.tally, what)
    mine = [
        (group.right(reward), np.array([len(completion.token_ids) for completion in group.completions]))
        for group in groups
    ]
    everyone = [row for part in parallel.gather_data_parallel(mine) for row in part]
    return Outcomes([correct for correct, _ in everyone], [lengths for _, lengths in everyone], groups)
