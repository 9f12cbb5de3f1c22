"""From prompts to scored groups: generation shared out over the data-parallel ranks, rewards scored meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import OnFinish, PendingCompletions, RolloutEngine, RolloutStats
from nemo_aapo.rollout.length_predictor import LengthMemory
from nemo_aapo.types import Completion, Group, Prompt, SamplingSpec


class RewardScorer(Protocol):
    """What the collector needs of ``rewards.runner.RewardRunner``."""

    def submit(self, index: Any, prompt: Prompt, text: str, completion: Completion) -> None:
        """Start scoring one completion; returns at once."""

    def collect(self) -> Mapping[Any, Any]:
        """``score``, ``parts`` (by reward) and ``failure`` of all submitted since the last call, by index."""


@dataclass(slots=True, eq=False)
class Drawing:
    """This data-parallel rank's share of the prompts while its completions are being drawn and scored."""

    order: Sequence[int]
    """Where each prompt stands in the share: they enter the engine longest expected first."""
    prompts: Sequence[Prompt]
    seeds: Sequence[Sequence[int]]
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    """On the model-parallel source rank, as completions end."""
    pending: PendingCompletions | None = None
    """Where the engine draws in the background."""

    @property
    def token_ids(self) -> list[np.ndarray]:
        """What the engine is fed."""
        return [prompt.token_ids for prompt in self.prompts]


@dataclass(slots=True)
class Collector:
    """Draws and scores completions; collective over all ranks of the job."""

    engine: RolloutEngine
    rewards: RewardScorer | None
    """On the model-parallel source rank; None elsewhere."""
    decode: Callable[[np.ndarray], str]
    """Token ids -> text, without special tokens."""
    room: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while the engine draws: makes room for it in GPU memory."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the last call on this rank: ``rollout`` (waiting for completions) and ``reward`` (for scores after that)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last call over all ranks: see ``engine_metrics``."""
    lengths: LengthMemory = field(default_factory=LengthMemory)
    """Decides which prompts enter the engine first; the same on all ranks."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        remember_lengths: bool = True,
    ) -> list[Group]:
        """This data-parallel rank's share of the prompts, completed and scored.

        Rank d of D takes prompts ``share(len(prompts))``: neighbours, so that the gathered shares are in order. The
        texts exist on the model-parallel source rank only; tokens and rewards on all ranks.

        Args:
            prompts: the same on all ranks.
            sampling: how to draw.
            seeds: ``seeds[i][j]`` of completion j of prompt i, as ``RolloutEngine.generate`` takes them.
            remember_lengths: let the completions' lengths decide the order of later calls.
        """
        drawing = self._share_of(prompts, seeds)
        start = time.perf_counter()
        with self.room():
            self.engine.wake()
            completions = self.engine.generate(drawing.token_ids, sampling, drawing.seeds, self._scoring(drawing))
            self.engine.sleep()
        return self._groups(drawing, completions, start, remember_lengths)

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingSpec, seeds: Sequence[Sequence[int]]) -> Drawing:
        """As ``collect``, but returns at once; the engine is a ``BackgroundEngine``.

        Until ``finish``, neither the engine nor the rewards may be asked for anything else.
        """
        drawing = self._share_of(prompts, seeds)
        drawing.pending = self.engine.start(drawing.token_ids, sampling, drawing.seeds, self._scoring(drawing))
        return drawing

    def finish(self, drawing: Drawing) -> list[Group]:
        """Wait for what ``begin`` began; what ``collect`` would have returned."""
        start = time.perf_counter()
        return self._groups(drawing, drawing.pending.result(), start)

    def _scoring(self, drawing: Drawing) -> OnFinish | None:
        """What has each completion scored as soon as it ends; one rank does."""
        if not parallel.is_model_parallel_source():
            return None

        def score(i: int, j: int, completion: Completion) -> None:
            drawing.texts[i, j] = self.decode(completion.token_ids)
            self.rewards.submit((i, j), drawing.prompts[i], drawing.texts[i, j], completion)

        return score

    def _share_of(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> Drawing:
        mine = share(len(prompts))
        prompts, seeds = prompts[mine], seeds[mine]
        order = self.lengths.order(prompts)
        return Drawing(order, [prompts[i] for i in order], [seeds[i] for i in order])

    def _groups(
        self, drawing: Drawing, completions: list[list[Completion]], start: float, remember_lengths: bool = True
    ) -> list[Group]:
        generated = time.perf_counter()
        source = parallel.is_model_parallel_source()
        # One rank judges and tells the others: a timeout could strike on one of them and not on the next.
        scores = parallel.broadcast_in_model_parallel(
            _tables(self.rewards.collect(), drawing.seeds) if source else None
        )
        self.seconds = {"rollout": generated - start, "reward": time.perf_counter() - generated}
        self._take_stock(drawing.prompts, completions, remember_lengths)
        groups = [
            Group(
                prompt=prompt,
                completions=tuple(row),
                texts=tuple(drawing.texts[i, j] for j in range(len(row))) if source else (),
                rewards=scores[i].rewards,
                reward_parts=scores[i].parts,
                failed=scores[i].failed,
            )
            for i, (prompt, row) in enumerate(zip(drawing.prompts, completions, strict=True))
        ]
        return [group for _, group in sorted(zip(drawing.order, groups, strict=True), key=lambda pair: pair[0])]

    def _take_stock(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], remember_lengths: bool
    ) -> None:
        """Metrics and lengths over all data-parallel ranks."""
        means = [
            (prompt.id, float(np.mean([len(completion.token_ids) for completion in row])))
            for prompt, row in zip(prompts, completions, strict=True)
            if row
        ]
        stats, means = zip(*parallel.gather_data_parallel((self.engine.stats, means)), strict=True)
        self.metrics = engine_metrics(stats)
        if remember_lengths:
            self.lengths.learn(mean for part in means for mean in part)


def engine_metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """What the rollout cost.

    Args:
        stats: one for each data-parallel rank.

    Returns:
        ``rollout/idle_fraction``: share of the engines' rows that stood empty, averaged over their steps; NaN where an
        engine can't tell. ``rollout/tokens_per_second``: completion tokens over the slowest engine's seconds.
    """
    steps, seconds = sum(stat.steps for stat in stats), max(stat.seconds for stat in stats)
    idle = sum(stat.idle_fraction * stat.steps for stat in stats)
    return {
        "rollout/idle_fraction": idle / steps if steps else float("nan"),
        "rollout/tokens_per_second": sum(stat.tokens for stat in stats) / seconds,
    }


@dataclass(frozen=True, slots=True)
class _Table:
    """The scores of one prompt's completions, [G] each."""

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray


def _tables(scores: Mapping[Any, Any], seeds: Sequence[Sequence[int]]) -> list[_Table]:
    tables = []
    for i, row in enumerate(seeds):
        judged = [scores[i, j] for j in range(len(row))]
        names = list(judged[0].parts) if judged else []
        tables.append(
            _Table(
                rewards=np.array([score.score for score in judged], dtype=np.float64),
                parts={n: np.array([score.parts[n] for score in judged], dtype=np.float64) for n in names},
                failed=np.array([score.failure is not None for score in judged], dtype=bool),
            )
        )
    return tables


def share(count: int) -> slice:
    """Which of ``count`` items this data-parallel rank takes: neighbours, as evenly as can be."""
    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    return slice(rank * count // size, (rank + 1) * count // size)
