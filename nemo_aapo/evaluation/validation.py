"""Validation in training: greedy and sampled accuracy on held-out prompts, with training's engine and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_aapo.errors import Interrupted
from nemo_aapo.evaluation.estimators import average
from nemo_aapo.evaluation.measure import Outcomes, measure
from nemo_aapo.rollout.collector import Collector
from nemo_aapo.rollout.scored import rows_of_all_ranks
from nemo_aapo.rollout.unscored import ScoringWatch
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Prompt, SamplingSpec


@dataclass(frozen=True, slots=True)
class Validator:
    """Measures a policy on a fixed set of prompts with fixed random streams; collective over all ranks."""

    collector: Collector
    prompts: Sequence[Prompt]
    reward: str
    """Name of the reward that tells right (1) from wrong."""
    greedy: SamplingSpec
    sampled: SamplingSpec
    samples: int
    """Sampled completions of each prompt; 0 leaves out the sampled accuracy."""
    seed: int
    stop: Callable[[], bool] = bool
    """Asked meanwhile: a validation that is broken off is made anew by whoever goes on with the run."""

    def run(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure.

        Returns:
            Metrics ``validation/accuracy_greedy``, ``validation/accuracy_sampled`` and its standard error
            ``validation/accuracy_sampled_stderr``, ``validation/failed_fraction``, ``validation/completion_length``
            (the same on all ranks); and the completions of all prompts as plain rows, on rank 0 (empty on the others).

        Raises:
            Interrupted: on all ranks, as ``stop`` was true on one.
            RewardError: on all ranks; not one completion could be judged.
        """
        greedy = self._measure(self.greedy, [[0]] * len(self.prompts))
        metrics = {"validation/accuracy_greedy": average(np.stack(greedy.correct)).value}
        last, rows, verdicts = greedy, rows_of_all_ranks(greedy.groups), [*greedy.correct]
        if self.samples:
            seeds = [
                [stream_seed(self.seed, "validation", prompt.id, k) for k in range(self.samples)]
                for prompt in self.prompts
            ]
            last = self._measure(self.sampled, seeds)
            accuracy = average(np.stack(last.correct))
            metrics |= {
                "validation/accuracy_sampled": accuracy.value,
                "validation/accuracy_sampled_stderr": accuracy.stderr,
            }
            rows += rows_of_all_ranks(last.groups)
            verdicts += last.correct
        metrics["validation/failed_fraction"] = float(np.isnan(np.concatenate(verdicts)).mean())
        metrics["validation/completion_length"] = float(np.concatenate(last.lengths).mean())
        return metrics, rows

    def _measure(self, sampling: SamplingSpec, seeds: Sequence[Sequence[int]]) -> Outcomes:
        watch = ScoringWatch(needed=self.reward)  # a new one: a validation without any verdict is none
        measured = (self.collector, self.prompts, sampling, seeds, self.reward)
        outcomes = measure(*measured, watch, "the validation", self.stop)
        if not outcomes.complete:
            raise Interrupted
        return outcomes
