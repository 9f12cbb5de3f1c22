"""From prompts to scored groups: generation shared out over the data-parallel ranks, rewards scored meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nemo_aapo import parallel
from nemo_aapo.rollout.engine import RolloutEngine
from nemo_aapo.types import Completion, Group, Prompt, SamplingSpec


class RewardScorer(Protocol):
    """What the collector needs of ``rewards.runner.RewardRunner``."""

    def submit(self, index: Any, prompt: Prompt, text: str, completion: Completion) -> None:
        """Start scoring one completion; returns at once."""

    def collect(self) -> Mapping[Any, Any]:
        """``score`` and ``parts`` (by reward) of everything submitted since the last call, by index."""


@dataclass(slots=True)
class Collector:
    """Draws and scores completions; collective over all ranks of the job."""

    engine: RolloutEngine
    rewards: RewardScorer | None
    """On the model-parallel source rank; None elsewhere."""
    decode: Callable[[np.ndarray], str]
    """Token ids -> text, without special tokens."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the last call on this rank: ``rollout`` (generation) and ``reward`` (waiting for scores after it)."""

    def collect(self, prompts: Sequence[Prompt], sampling: SamplingSpec, seeds: Sequence[Sequence[int]]) -> list[Group]:
        """This data-parallel rank's share of the prompts, completed and scored.

        Rank d of D takes prompts ``share(len(prompts))``: neighbours, so that the gathered shares are in order. The
        texts exist on the model-parallel source rank only; tokens and rewards on all ranks.

        Args:
            prompts: the same on all ranks.
            sampling: how to draw.
            seeds: ``seeds[i][j]`` of completion j of prompt i, as ``RolloutEngine.generate`` takes them.
        """
        mine = share(len(prompts))
        prompts, seeds = prompts[mine], seeds[mine]
        source = parallel.is_model_parallel_source()
        texts: dict[tuple[int, int], str] = {}

        def score(i: int, j: int, completion: Completion) -> None:
            texts[i, j] = self.decode(completion.token_ids)
            self.rewards.submit((i, j), prompts[i], texts[i, j], completion)

        start = time.perf_counter()
        ids = [prompt.token_ids for prompt in prompts]
        self.engine.wake()
        completions = self.engine.generate(ids, sampling, seeds, score if source else None)
        self.engine.sleep()
        generated = time.perf_counter()
        # One rank judges and tells the others: a timeout could strike on one of them and not on the next.
        scores = parallel.broadcast_in_model_parallel(_tables(self.rewards.collect(), seeds) if source else None)
        self.seconds = {"rollout": generated - start, "reward": time.perf_counter() - generated}
        return [
            Group(
                prompt=prompt,
                completions=tuple(row),
                texts=tuple(texts[i, j] for j in range(len(row))) if source else (),
                rewards=scores[i][0],
                reward_parts=scores[i][1],
            )
            for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True))
        ]


def _tables(
    scores: Mapping[Any, Any], seeds: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Per prompt: total rewards [G] and each reward's values [G] by name."""
    tables = []
    for i, row in enumerate(seeds):
        judged = [scores[i, j] for j in range(len(row))]
        names = list(judged[0].parts) if judged else []
        parts = {name: np.array([score.parts[name] for score in judged], dtype=np.float64) for name in names}
        tables.append((np.array([score.score for score in judged], dtype=np.float64), parts))
    return tables


def share(count: int) -> slice:
    """Which of ``count`` items this data-parallel rank takes: neighbours, as evenly as can be."""
    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    return slice(rank * count // size, (rank + 1) * count // size)
