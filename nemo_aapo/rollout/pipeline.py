"""The groups of each training step: generated when the step comes, or one step ahead of it.

    rollout.async_depth 0    generate k          | train k      | refit | generate k+1          | train k+1 ...
    rollout.async_depth 1    wait for k  | refit | train k              | wait for k+1  | refit | train k+1 ...
                                         | generate k+1 in the background               | generate k+2 ...

Ahead, completions of step k+1 come from the policy before step k's update: one step old when they are trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import ReportsServers
from nemo_aapo.rollout import pending
from nemo_aapo.rollout.collector import Collector, InFlightRollout, own_shard
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.rollout.unscored import TOTAL, ScoringWatch, Tally
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Group, Prompt, SamplingSpec


class ServedPolicy(Protocol):
    """What the pipeline needs of the policy; ``MegatronPolicy`` has it."""

    @property
    def version(self) -> int: ...
    def named_weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...
    def reference_weights(self) -> AbstractContextManager[None]: ...


class RolloutPipeline:
    """Scored groups of each training step; collective over all ranks of the job."""

    def __init__(
        self,
        *,
        config: Config,
        policy: ServedPolicy,
        collector: Collector,
        sampling: SamplingSpec,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        reference: ReferenceRewards | None,
    ) -> None:
        """Args:
        policy: its ``version`` and weights, for the engine.
        sampling: how policy and reference are sampled.
        prompts: all of the training data; ``sampler`` says which ones a step has.
        reference: where reference rewards come from; None for an algorithm without a margin.
        """
        self.config, self.policy, self.collector, self.sampling = config, policy, collector, sampling
        self.data, self.sampler, self.reference = prompts, sampler, reference
        self.runs_ahead = bool(config.rollout.async_depth)
        """Whether a step's rollout is generated while the step before it is trained on."""
        self.seconds: dict[str, float] = {}
        """Since the last ``generate`` began, on this rank: rollout, reward, reference, refit."""
        self.metrics: dict[str, float] = {}
        """The engine's, over all ranks, when it generated the last groups; NaN where a checkpoint held them."""
        self._served: int = policy.version  # of the weights that the engine has
        self._ahead: InFlightRollout | list[Group] | None = None  # the next step's: under way, or in hand
        self._tally = Tally()  # of the groups in hand; empty where a checkpoint held them
        self._watch = ScoringWatch()

    def prompts(self, step: int) -> list[Prompt]:
        """Of a step, counted from 0; the same on all ranks."""
        return [self.data[i] for i in self.sampler.indices(step)]

    def epochs(self, step: int) -> float:
        """How often the steps before this one took each prompt, on average."""
        return self.sampler.epochs(step)

    # ------------------------------------------------------------------ a step

    def generate(self, step: int) -> list[Group]:
        """This rank's groups of a step, with rewards and reference rewards; waits for them where they were begun.

        Raises:
            FloatingPointError: the engine's log-probs are not finite.
            RuntimeError: the engine does not serve the policy: ``refit`` comes first.
            RewardError: on all ranks; the rewards fail for everything, and nothing of the step was taken up.
        """
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "refit"), 0.0)
        prompts, groups = self.prompts(step), self.settle()
        if groups is None:
            self._require_refitted()
            groups = self._collected(lambda: self.collector.collect(prompts, self.sampling, self._seeds(step, prompts)))
        self._watch.check(self._tally, f"step {step + 1}")
        self._ahead = None
        self.sampler.step = step + 1
        self._observe(step, groups)  # before the next step's prompts are asked for
        with self._timed("reference"):
            rewards = self.reference.rewards(prompts, step, self.reference_served) if self.reference else {}
        return [group.replace(reference_rewards=rewards.get(group.prompt.id)) for group in groups]

    def begin(self, step: int) -> None:
        """Have a step's completions generated in the background, by the policy that the engine serves now."""
        if step < self.config.trainer.max_steps:
            self._require_refitted()
            prompts = self.prompts(step)
            self._ahead = self.collector.begin(prompts, self.sampling, self._seeds(step, prompts))

    def settle(self) -> list[Group] | None:
        """Wait for what is under way, so that the engine is free; the next step's groups, where it runs ahead."""
        if isinstance(self._ahead, InFlightRollout):
            rollout = self._ahead
            self._ahead = self._collected(lambda: self.collector.finish(rollout))
        return self._ahead

    def refit(self) -> None:
        """Bring the engine to the policy's weights, where it has others; nothing may be under way."""
        version = self.policy.version
        if self._served != version:
            with self._timed("refit"):
                self.collector.engine.update_weights(self.policy.named_weights(), version)
            if not self.collector.engine.shares_weights:
                self.metrics["rollout/refit_bytes"] = self.collector.engine.refit_bytes
            if isinstance(self.collector.engine, ReportsServers):
                self.metrics |= self.collector.engine.server_metrics()
            self._served = version

    # ------------------------------------------------------------------ the reference

    def fill_reference(self, step: int, report: Callable[[int, int], None], stop_requested: Callable[[], bool]) -> bool:
        """Have a step's stored reference rewards at hand; if they are not, sample those of the steps ahead with them.

        The engine serves the policy again afterwards.

        Returns:
            False if a stop was requested meanwhile.
        """
        if self.reference is None or self.reference.online or self.reference.has(self.prompts(step)):
            return True
        self.settle()
        last = self.config.trainer.max_steps
        end = min(step + (self.config.algorithm.reference_fill_steps or last), last)
        wanted: dict[int, None] = {}
        for later in range(step, end):
            if len(wanted) == self.sampler.num_prompts or not self.sampler.knows(later):
                break
            wanted.update(dict.fromkeys(self.sampler.indices(later)))
        prompts = [self.data[i] for i in wanted]
        complete = self.reference.prepare(prompts, self.reference_served, report, stop_requested)
        if complete:
            self.refit()
        return complete

    @contextmanager
    def reference_served(self) -> Iterator[None]:
        """Inside, the engine serves the reference; afterwards the policy has its weights back, bit for bit.

        Nothing is moved where the engine serves the reference already: before the first update, or in a copy of its own
        that had none since. Else the engine has to be refitted before it generates for the policy again.
        """
        engine = self.collector.engine
        if self.policy.version == 0 or (self._served == 0 and not engine.shares_weights):
            yield
            return
        with self.policy.reference_weights():
            engine.update_weights(self.policy.named_weights(), 0)  # the reference has no optimizer step behind it
            self._served = 0
            yield

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's part of a checkpoint: the cursor in the data, which reference rewards, expected lengths."""
        return {
            "sampler": self.sampler.state_dict(),
            "reference": self.reference.state_dict() if self.reference is not None else None,
            "completion_lengths": self.collector.length_predictor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ConfigError: the run began with other reference rewards.
            ValueError: the state belongs to another order of prompts.
        """
        self.sampler.load_state_dict(state["sampler"])
        self.collector.length_predictor.load_state_dict(state["completion_lengths"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def pending_files(self) -> dict[str, bytes]:
        """Rollouts made and not yet trained on, as files for a checkpoint; rank 0's count."""
        groups = self.settle()
        if groups is None or (self._tally.completions and not self._tally.scored[TOTAL]):
            return {}  # what could not be scored at all is better sampled anew
        everyone = [group for part in parallel.gather_data_parallel(groups) for group in part]
        return {pending.FILE_NAME: pending.pack(everyone) if parallel.rank() == 0 else b""}

    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Take up the rollouts that a checkpoint holds for the next step, if it holds any."""
        path = checkpoint / pending.FILE_NAME
        content = path.read_bytes() if parallel.rank() == 0 and path.exists() else None
        if (content := parallel.broadcast_from_first_rank(content)) is not None:
            self.metrics = {"rollout/idle_fraction": math.nan, "rollout/tokens_per_second": math.nan}
            self._tally = Tally()
            self._ahead = pending.unpack(content, self.prompts(step))[own_shard(self.config.prompts_per_step)]

    # ------------------------------------------------------------------ parts

    def _require_refitted(self) -> None:
        if self._served != self.policy.version:
            raise RuntimeError(
                f"the engine serves policy version {self._served}, the policy is at {self.policy.version}: refit() "
                "comes before the next rollout"
            )

    def _observe(self, step: int, groups: Sequence[Group]) -> None:
        """Tell a sampler that goes by accuracy how many completions of each prompt were right, of those judged."""
        if not self.sampler.observes:
            return
        verdicts = [group.right(self.config.validation.reward) for group in groups]
        mine = [(int((right == 1).sum()), int((~np.isnan(right)).sum())) for right in verdicts]
        counts = [count for part in parallel.gather_data_parallel(mine) for count in part]
        self.sampler.observe(step, dict(zip(self.sampler.indices(step), counts, strict=True)))

    def _seeds(self, step: int, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The random stream of each completion."""
        return [
            [stream_seed(self.config.seed, "rollout", step, i, j) for j in range(self.config.group_size)]
            for i in range(len(prompts))
        ]

    def _collected(self, collect: Callable[[], list[Group]]) -> list[Group]:
        groups = collect()
        self._tally = self.collector.tally
        self.seconds |= self.collector.seconds
        self.metrics = self.collector.metrics
        return groups

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
