"""Validation: greedy and sampled accuracy on held-out prompts, by the engine and the rewards that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_aapo import parallel
from nemo_aapo.experiment import rollout_rows
from nemo_aapo.rollout.collect import Collector
from nemo_aapo.seeds import stream_seed
from nemo_aapo.statistics import accuracy
from nemo_aapo.types import Group, Prompt, SamplingSpec


@dataclass(frozen=True, slots=True)
class Validator:
    """Measures a policy on a fixed set of prompts with fixed random streams; collective over all ranks."""

    collector: Collector
    prompts: Sequence[Prompt]
    reward: str
    """Which reward says right (1) or wrong."""
    greedy: SamplingSpec
    sampled: SamplingSpec
    samples: int
    """Sampled completions per prompt; 0 leaves out the sampled accuracy."""
    seed: int

    def run(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure.

        Returns:
            Metrics ``validation/accuracy_greedy``, ``validation/accuracy_sampled`` and its standard error
            ``validation/accuracy_sampled_stderr``, ``validation/completion_length`` (the same on all ranks); and the
            completions of this rank's share of the prompts as plain rows (empty but on model-parallel source ranks).
        """
        greedy = self.collector.collect(self.prompts, self.greedy, [[0]] * len(self.prompts))
        metrics = {"validation/accuracy_greedy": accuracy(self._correct(greedy))[0]}
        groups = greedy
        if self.samples:
            seeds = [
                [stream_seed(self.seed, "validation", prompt.id, k) for k in range(self.samples)]
                for prompt in self.prompts
            ]
            sampled = self.collector.collect(self.prompts, self.sampled, seeds)
            mean, error = accuracy(self._correct(sampled))
            metrics |= {"validation/accuracy_sampled": mean, "validation/accuracy_sampled_stderr": error}
            groups = sampled
        lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
        gathered = np.array([n for part in parallel.gather_data_parallel(lengths) for n in part])
        metrics["validation/completion_length"] = float(gathered.mean())
        return metrics, rollout_rows(greedy + (groups if self.samples else []))

    def _correct(self, groups: Sequence[Group]) -> np.ndarray:
        """bool [prompts, samples] over all ranks."""
        mine = [group.reward_parts[self.reward] >= 1.0 for group in groups]
        return np.stack([row for part in parallel.gather_data_parallel(mine) for row in part])
