"""What all rollout pipelines have in common: the engine's weights, the prompts of a step, and the reference's rewards.

``in_order.py`` and ``in_flight.py`` say which policy generates a step's groups, and when.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_aapo.config import Config
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.engines.base import ReportsServers
from nemo_aapo.rollout.buffer import Policy, RolloutBuffer
from nemo_aapo.rollout.collector import Collector
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.rollout.saved.bank import RolloutBank
from nemo_aapo.rollout.unscored import ScoringWatch
from nemo_aapo.seeds import stream_seed
from nemo_aapo.trace import spans
from nemo_aapo.types import Group, Prompt, SamplingSpec

PARITY_TOKENS = 32
"""Most tokens of a completion that is sampled only to compare engine and learner."""


class ServedPolicy(Protocol):
    """What the pipeline needs of the policy; ``MegatronPolicy`` has it."""

    @property
    def version(self) -> int: ...
    def named_weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...
    def reference_weights(self) -> AbstractContextManager[None]: ...


class RolloutPipeline(ABC):
    """Scored groups of each training step; collective over all ranks of the job."""

    def __init__(
        self,
        buffered: Policy,
        *,
        config: Config,
        policy: ServedPolicy,
        collector: Collector,
        sampling: SamplingSpec,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        reference: ReferenceRewards | None,
        bank: RolloutBank | None = None,
    ) -> None:
        """Args:
        buffered: which groups may be started, and which are trained on next.
        policy: its ``version`` and weights, for the engine.
        sampling: how policy and reference are sampled.
        prompts: all of the training data; ``sampler`` says which ones a step has.
        reference: where reference rewards come from; None for an algorithm without a margin.
        bank: keeps what is generated for a run that goes on after a kill; None: nothing does.
        """
        self.config, self.policy, self.collector, self.sampling = config, policy, collector, sampling
        self.data, self.sampler, self.reference, self.bank = prompts, sampler, reference, bank
        self.runs_ahead = bool(buffered.depth)
        """Whether a step's rollout is begun before the step before it is trained on."""
        self.seconds: dict[str, float] = {}
        """Since the last ``generate`` began, on this rank: rollout, reward, reference, refit."""
        self.metrics: dict[str, float] = {}
        """The engine's, over all ranks, when it generated the last groups; NaN where a checkpoint held them."""
        self._refit_metrics: dict[str, float] = {}
        self._served: int = policy.version  # of the weights that the engine has
        self.buffer = RolloutBuffer(buffered, prompts_drawn(config))
        """Which groups have been started and not trained on."""
        self._watch = ScoringWatch()
        self._taken_up = False  # whether a checkpoint or the bank held completions of the process before this one
        self._steps_needed = 1  # so many steps' prompts, from the next one on, may be trained on next

    def prompts(self, step: int) -> list[Prompt]:
        """Of a step, counted from 0; the same on all ranks."""
        return [self.data[i] for i in self.sampler.indices(step)]

    def epochs(self, step: int) -> float:
        """How often the steps before this one took each prompt, on average."""
        return self.sampler.epochs(step)

    def refit(self) -> None:
        """Bring the engine to the policy's weights, where it has others; what is under way keeps those that it has."""
        version = self.policy.version
        if self._served != version:
            engine = self.collector.engine
            self.seconds["refit"] = 0.0
            with self._timed("refit"):
                engine.update_weights(self.policy.named_weights(), version)
            self._served = version
            if not engine.shares_weights:
                self._refit_metrics = {"rollout/refit_bytes": engine.refit_bytes}
            if isinstance(engine, ReportsServers):
                self._refit_metrics |= engine.server_metrics()
            self.metrics |= self._refit_metrics

    def parity_sample(self) -> list[Group] | None:
        """What this process's engine samples by the weights that it serves, for the parity gate. Collective.

        A completion of each prompt of a step, of at most ``PARITY_TOKENS`` tokens and without rewards: so every engine
        that has a part in a step has one here. Their random streams are their own, and nothing of a step changes.

        Returns:
            This rank's part; None on all ranks where the first step's own completions will do, as no others than this
            process's engine samples them.
        """
        if not self._taken_up:
            return None
        self._require_refitted()
        step = self.sampler.step
        prompts = self.prompts(step)
        seeds = [[stream_seed(self.config.seed, "parity", step, i)] for i in range(len(prompts))]
        tokens = min(PARITY_TOKENS, self.sampling.max_new_tokens)
        sampling = dataclasses.replace(self.sampling, max_new_tokens=tokens)
        unscored = dataclasses.replace(self.collector, rewards=None)
        return unscored.collect(prompts, sampling, seeds, observe_lengths=False)

    # ------------------------------------------------------------------ the reference

    def fill_reference(self, step: int, report: Callable[[int, int], None], stop_requested: Callable[[], bool]) -> bool:
        """Have a step's stored reference rewards at hand; if they are not, sample those of the steps ahead with them.

        The engine serves the policy again afterwards.

        Returns:
            False if a stop was requested meanwhile.
        """
        if self.reference is None or self.reference.online or self._has_references(step):
            return True
        self.settle()
        last = self.config.trainer.max_steps
        filled = max(self.config.algorithm.reference_fill_steps or last, self._steps_needed)
        end = min(step + filled, last)
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

    def _has_references(self, step: int) -> bool:
        assert self.reference is not None
        steps = range(step, min(step + self._steps_needed, self.config.trainer.max_steps))
        return all(self.reference.has(self.prompts(later)) for later in steps)

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
        self.buffer.done = self.sampler.step
        self.collector.length_predictor.load_state_dict(state["completion_lengths"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def drawn_later(self) -> str:
        """What to tell whoever goes on from a checkpoint without what an uninterrupted run has in hand; empty if none.

        A run begins no rollouts of steps behind its end. If it is given a later one, those that would have been begun
        by its checkpoint are drawn by a later policy than in a run that had the later end from its beginning.
        """
        if (later := self.not_begun()) is None:
            return ""
        return (
            f"nothing of step {later + 1} was begun ahead (rollout.async_depth, rollout.max_lag) for the checkpoint of "
            f"step {self.sampler.step}, where the run had an earlier end, or nothing of it could be scored: from step "
            f"{later + 1} on the run goes on as well, but not to the bits of one that had trainer.max_steps="
            f"{self.config.trainer.max_steps} from its beginning and was not interrupted"
        )

    # ------------------------------------------------------------------ what each kind does in its own way

    @abstractmethod
    def not_begun(self) -> int | None:
        """The first step that should be begun by now, ahead of the next one, and is not; None: there is none."""

    @abstractmethod
    def generate(self, step: int) -> list[Group]:
        """This rank's groups of a step, with rewards and reference rewards; waits for them where they were begun.

        Raises:
            FloatingPointError: the engine's log-probs are not finite.
            RuntimeError: the engine does not serve the policy: ``refit`` comes first.
            RewardError: on all ranks; the rewards fail for everything, and nothing of the step was taken up.
            Interrupted: on all ranks; a stop broke off a wait, and nothing of the step was taken up.
        """

    @abstractmethod
    def begin(self, step: int) -> None:
        """Have the completions begun that the policy draws before it is trained on this step."""

    @abstractmethod
    def settle(self) -> object:
        """Wait for what is under way, so that the engine is free.

        Raises:
            Interrupted: on all ranks; a stop broke off the wait.
        """

    @abstractmethod
    def pending_files(self) -> dict[str, bytes]:
        """Rollouts made and not yet trained on, as files for a checkpoint; rank 0's count.

        Raises:
            Interrupted: on all ranks; a stop broke off what a resumed run could not make again.
        """

    @abstractmethod
    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Take up the rollouts that a checkpoint holds for the steps to come, if it holds any."""

    @abstractmethod
    def recover(self) -> None:
        """Take up what the bank holds of steps that are to come. Collective.

        Raises:
            RunError: on all ranks; it is another run's.
        """

    @abstractmethod
    def checkpointed(self, step: int) -> None:
        """A checkpoint that is whole on the disk holds all up to this step, and what was generated ahead of it."""

    # ------------------------------------------------------------------ parts

    def _require_refitted(self) -> None:
        if self._served != self.policy.version:
            raise RuntimeError(
                f"the engine serves policy version {self._served}, the policy is at {self.policy.version}: refit() "
                "comes before the next rollout"
            )

    def _trained_before(self, step: int) -> None:
        if step > self.buffer.done:
            self.buffer.trained()

    def _seeds(self, step: int, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The random stream of each completion."""
        return [
            [stream_seed(self.config.seed, "rollout", step, i, j) for j in range(self.config.group_size)]
            for i in range(len(prompts))
        ]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        spans.timed(name, start, end)
