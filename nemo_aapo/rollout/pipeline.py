"""Where the trainer's groups come from, step by step: drawn when the step comes, or one step ahead of it.

    rollout.async_depth 0    draw k | train k | refit | draw k+1 | train k+1 ...
    rollout.async_depth 1    draw k | refit | train k    | refit | train k+1 ...
                                    | draw k+1           | draw k+2

Ahead, completions of step k+1 come from the policy before step k's update: one step old when they are trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.distributed import parallel
from nemo_aapo.rollout import pending
from nemo_aapo.rollout.collector import Collector, Drawing, share
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Group, Prompt, SamplingSpec


class RolloutSource:
    """Scored groups of each training step; collective over all ranks of the job."""

    def __init__(
        self,
        *,
        config: Config,
        policy: Any,
        collector: Collector,
        sampling: SamplingSpec,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        reference: ReferenceRewards | None,
    ) -> None:
        """Args:
        policy: its ``version`` and ``named_weights()``, for the engine.
        prompts: all of the training data; ``sampler`` says which ones a step has.
        """
        self.config, self.policy, self.collector, self.sampling = config, policy, collector, sampling
        self.data, self.sampler, self.reference = prompts, sampler, reference
        self.seconds: dict[str, float] = {}
        """Since the last ``groups`` began, on this rank: rollout, reward, reference, refit."""
        self.metrics: dict[str, float] = {}
        """Of the engine, over all ranks, when it drew the last ``groups``; NaN where a checkpoint held them."""
        self._served: int = policy.version  # of the weights that the engine has
        self._ahead: Drawing | list[Group] | None = None  # of the next step: under way, or in hand

    def prompts(self, step: int) -> list[Prompt]:
        """Of a step, counted from 0; the same on all ranks."""
        return [self.data[i] for i in self.sampler.indices(step)]

    def groups(self, step: int) -> list[Group]:
        """This rank's groups of a step, with rewards and reference rewards; the next step's may begin to be drawn.

        Raises:
            FloatingPointError: the engine's log-probs are not finite.
        """
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "refit"), 0.0)
        if self._ahead is None:
            self.refit()
            groups = self._collected(lambda: self.collector.collect(*self._order(step)))
        else:
            groups = self.settle()
        self._ahead = None
        prompts, served = self.prompts(step), self.reference_served
        self._observe(step, groups)  # before the next step's prompts are asked for
        with self._timed("reference"):
            reference = self.reference.rewards(prompts, step, served) if self.reference else {}
        if self.config.rollout.async_depth and step + 1 < self.config.trainer.max_steps:
            self.refit()
            self._ahead = self.collector.begin(*self._order(step + 1))
        return [group.replace(reference_rewards=reference.get(group.prompt.id)) for group in groups]

    def settle(self) -> list[Group] | None:
        """Wait for what is under way, so that the engine is free; the next step's groups, if they are drawn ahead."""
        if isinstance(self._ahead, Drawing):
            drawing = self._ahead
            self._ahead = self._collected(lambda: self.collector.finish(drawing))
        return self._ahead

    def refit(self) -> None:
        """Bring the engine to the policy's weights; nothing is under way."""
        if self._served != self.policy.version:
            with self._timed("refit"):
                self.collector.engine.update_weights(self.policy.named_weights(), self.policy.version)
            self._served = self.policy.version

    def fill_reference(self, step: int, report: Callable[[int, int], None], stop_requested: Callable[[], bool]) -> bool:
        """Have a step's stored reference rewards at hand; if they are not, draw those of the steps ahead with them.

        Returns:
            False if a stop was requested meanwhile.
        """
        if self.reference is None or self.reference.online or self.reference.has(self.prompts(step)):
            return True
        self.settle()
        last = self.config.trainer.max_steps
        end = min(step + (self.config.algorithm.reference_fill_steps or last), last)
        wanted = dict.fromkeys(i for s in range(step, end) if self.sampler.knows(s) for i in self.sampler.indices(s))
        return self.reference.prepare([self.data[i] for i in wanted], self.reference_served, report, stop_requested)

    @contextmanager
    def reference_served(self) -> Iterator[None]:
        """Inside, the engine draws from the reference; afterwards the policy's weights are back, bit for bit.

        Nothing is moved where the engine serves the reference already: before the first update, or in a copy of its own
        that had none since.
        """
        engine = self.collector.engine
        if self.policy.version == 0 or (self._served == 0 and not engine.shares_weights):
            yield
            return
        with self.policy.reference_weights():
            engine.update_weights(self.policy.named_weights(), 0)  # the reference has no optimizer step behind it
            self._served = 0  # the next refit gives it the policy again
            yield

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> dict[str, bytes]:
        """Rollouts made and not yet trained on, as files for a checkpoint; rank 0's count."""
        groups = self.settle()
        if groups is None:
            return {}
        everyone = [group for part in parallel.gather_data_parallel(groups) for group in part]
        return {pending.FILE_NAME: pending.pack(everyone) if parallel.rank() == 0 else b""}

    def load(self, checkpoint: Path, step: int) -> None:
        """Take up the rollouts that a checkpoint holds for the next step, if it holds any."""
        path = checkpoint / pending.FILE_NAME
        content = path.read_bytes() if parallel.rank() == 0 and path.exists() else None
        if (content := parallel.broadcast_from_first_rank(content)) is not None:
            self.metrics = {"rollout/idle_fraction": math.nan, "rollout/tokens_per_second": math.nan}
            self._ahead = pending.unpack(content, self.prompts(step))[share(self.config.prompts_per_step)]

    # ------------------------------------------------------------------ parts

    def _observe(self, step: int, groups: Sequence[Group]) -> None:
        """Tell a sampler that goes by accuracy how many completions of each prompt were right."""
        if not self.sampler.observes:
            return
        name = self.config.validation.reward
        mine = [(int(group.right(name).sum()), len(group.completions)) for group in groups]
        counts = [count for part in parallel.gather_data_parallel(mine) for count in part]
        self.sampler.observe(step, dict(zip(self.sampler.indices(step), counts, strict=True)))

    def _order(self, step: int) -> tuple[list[Prompt], SamplingSpec, list[list[int]]]:
        """What the collector is asked for: a step's prompts, and the random stream of each completion."""
        prompts = self.prompts(step)
        seeds = [
            [stream_seed(self.config.seed, "rollout", step, i, j) for j in range(self.config.group_size)]
            for i in range(len(prompts))
        ]
        return prompts, self.sampling, seeds

    def _collected(self, collect: Callable[[], list[Group]]) -> list[Group]:
        groups = collect()
        self.seconds |= self.collector.seconds
        self.metrics = self.collector.metrics
        return groups

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
