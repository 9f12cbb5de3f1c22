"""The groups of each training step: generated when the step comes, or L = ``rollout.async_depth`` steps ahead of it.

    L = 0    generate k                  | train k          | refit | generate k+1            | train k+1 ...
    L = 1    refit | begin k+1, wait for k | train k        | refit | begin k+2, wait for k+1 | train k+1 ...
    L = 2    refit | begin k+2, wait for k | train k        | refit | begin k+3, wait for k+1 | train k+1 ...

Step k trains on completions of the policy as it stood before step max(0, k - L), and steps are taken in order: which
policy draws a completion follows from its step alone, never from how fast anybody was. With an engine that generates
in the foreground the bits are the same and no time is gained.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_first_rank
from nemo_aapo.engines.base import BackgroundEngine, ReportsServers
from nemo_aapo.errors import Interrupted
from nemo_aapo.rollout.buffer import InOrder, RolloutBuffer, State
from nemo_aapo.rollout.collector import Collector, InFlightRollout, own_shard
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.rollout.saved import pending
from nemo_aapo.rollout.saved.bank import RolloutBank, completions_of
from nemo_aapo.rollout.scored import Banking, ScoredRollout, mean_lengths
from nemo_aapo.rollout.unscored import TOTAL, ScoringWatch
from nemo_aapo.seeds import stream_seed
from nemo_aapo.trace import spans
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
        bank: RolloutBank | None = None,
    ) -> None:
        """Args:
        policy: its ``version`` and weights, for the engine.
        sampling: how policy and reference are sampled.
        prompts: all of the training data; ``sampler`` says which ones a step has.
        reference: where reference rewards come from; None for an algorithm without a margin.
        bank: keeps what is generated for a run that goes on after a kill; None: nothing does.
        """
        self.config, self.policy, self.collector, self.sampling = config, policy, collector, sampling
        self.data, self.sampler, self.reference, self.bank = prompts, sampler, reference, bank
        self.runs_ahead = bool(config.rollout.async_depth)
        """Whether a step's rollout is begun before the step before it is trained on."""
        self.seconds: dict[str, float] = {}
        """Since the last ``generate`` began, on this rank: rollout, reward, reference, refit."""
        self.metrics: dict[str, float] = {}
        """The engine's, over all ranks, when it generated the last groups; NaN where a checkpoint held them."""
        self._refit_metrics: dict[str, float] = {}
        self._served: int = policy.version  # of the weights that the engine has
        self._ahead: dict[int, InFlightRollout | ScoredRollout] = {}  # by step: under way, or in hand
        self.buffer = RolloutBuffer(InOrder(config.rollout.async_depth), prompts_drawn(config))
        """Which groups have been started and not trained on."""
        self._watch = ScoringWatch()
        self._banked: dict[int, list[bytes]] = {}  # by step: records of the process before this one

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
            Interrupted: on all ranks; a stop broke off a wait, and nothing of the step was taken up.
        """
        refit_s = self.seconds.get("refit", 0.0) if self.runs_ahead else 0.0  # it came before
        self.seconds = {**dict.fromkeys(("rollout", "reward", "reference"), 0.0), "refit": refit_s}
        self._trained_before(step)
        rollout = self._finished(step) if step in self._ahead else self._drawn(step)
        self._watch.check(rollout.tally, f"step {step + 1}")
        with self._timed("reference"):
            prompts = self.prompts(step)
            rewards = self.reference.rewards(prompts, step, self.reference_served) if self.reference else {}
        self._ahead.pop(step, None)
        if self.runs_ahead:
            self.seconds["in_hand"] = self.buffer.oldest(State.IN_HAND)
        self.buffer.take((step, i) for i in range(prompts_drawn(self.config)))
        self.metrics = rollout.metrics | self._refit_metrics
        # What a step's completions tell counts from here on, whenever they were drawn.
        self.collector.length_predictor.observe(rollout.lengths)
        self.sampler.step = step + 1
        self._observe(step, rollout.groups)  # before the next step's prompts are asked for
        return [group.replace(reference_rewards=rewards.get(group.prompt.id)) for group in rollout.groups]

    def begin(self, step: int) -> None:
        """Have the completions begun that the policy draws before it is trained on this step.

        Those are of the steps up to L = ``rollout.async_depth`` behind it, as far as the sampler knows their prompts.
        They are generated in the background, or by an engine that can't in the foreground.
        """
        self._trained_before(step)
        depth, background = self.config.rollout.async_depth, isinstance(self.collector.engine, BackgroundEngine)
        for later in range(self.sampler.step, min(step + depth + 1, self.config.trainer.max_steps)):
            if later not in self._ahead and self.sampler.knows(later):
                self._ahead[later] = self._begun(later) if background else self._drawn(later)

    def settle(self) -> list[ScoredRollout]:
        """Wait for what is under way, so that the engine is free; the rollouts of the steps to come, in order.

        Raises:
            Interrupted: on all ranks; a stop broke off the wait, and the first that was not there is lost, with those
                behind it.
        """
        return [self._finished(step) for step in sorted(self._ahead)]

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
        self.buffer.done = self.sampler.step
        self.collector.length_predictor.load_state_dict(state["completion_lengths"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])

    def pending_files(self) -> dict[str, bytes]:
        """Rollouts made and not yet trained on, as files for a checkpoint; rank 0's count.

        All that were begun are waited for: the weights that would go on with them are gone when the run is resumed.

        Raises:
            Interrupted: on all ranks; a stop broke off what draws them, so that a run which went on from here would
                draw them with later weights.
        """
        end = min(self.sampler.step + self.config.rollout.async_depth, self.config.trainer.max_steps)
        if any(step not in self._ahead and self.sampler.knows(step) for step in range(self.sampler.step, end)):
            raise Interrupted("completions of the steps to come were not all begun")
        # What could not be scored at all is better sampled anew.
        kept = list(itertools.takewhile(lambda r: not r.tally.completions or r.tally.scored[TOTAL], self.settle()))
        if not kept:
            return {}
        parts = parallel.gather_data_parallel([rollout.groups for rollout in kept])
        everyone = [group for of_step in zip(*parts, strict=True) for part in of_step for group in part]
        return {pending.FILE_NAME: pending.pack(everyone) if parallel.rank() == 0 else b""}

    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Take up the rollouts that a checkpoint holds for the steps to come, if it holds any."""
        path = checkpoint / pending.FILE_NAME
        content = path.read_bytes() if parallel.rank() == 0 and path.exists() else None
        if (content := parallel.broadcast_from_first_rank(content)) is not None:
            size = prompts_drawn(self.config)
            steps = range(step, step + pending.count(content) // size)
            groups = pending.unpack(content, [prompt for later in steps for prompt in self.prompts(later)])
            for i, later in enumerate(steps):
                of_step = groups[i * size : (i + 1) * size]
                for k in range(size):
                    self.buffer.restore((later, k), max(0, later - self.config.rollout.async_depth))
                self._ahead[later] = ScoredRollout(of_step[own_shard(size)], mean_lengths(of_step))

    def recover(self) -> None:
        """Take up what the bank holds of steps that are to come. Collective.

        Raises:
            RunError: on all ranks; it is another run's.
        """
        if (bank := self.bank) is not None:
            self._banked = on_first_rank(bank.recover)

    def checkpointed(self, step: int) -> None:
        """A checkpoint that is whole on the disk holds all up to this step, and what was generated ahead of it."""
        if self.bank is not None and step:
            if step >= self.config.trainer.max_steps:
                self.bank.remove()
            else:
                self.bank.forget(before=step + self.config.rollout.async_depth)

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

    def _begun(self, step: int) -> InFlightRollout:
        prompts, bank = self._started(step)
        return self.collector.begin(prompts, self.sampling, self._seeds(step, prompts), **bank)

    def _drawn(self, step: int) -> ScoredRollout:
        prompts, bank = self._started(step)
        seeds = self._seeds(step, prompts)
        return self._scored(step, self.collector.collect(prompts, self.sampling, seeds, observe_lengths=False, **bank))

    def _started(self, step: int) -> tuple[list[Prompt], Banking]:
        """The prompts of a step that is begun with the policy that the engine serves; what the bank has of it."""
        self._require_refitted()
        prompts = self.prompts(step)
        for i in range(len(prompts)):
            self.buffer.start((step, i))
        if (bank := self.bank) is None:
            return prompts, {}
        found = completions_of(self._banked.pop(step, []), prompts, self.policy.version, self.config.group_size)
        if self.config.rollout.bank == "exact" and len(found) < len(prompts):
            found = {}  # in a smaller batch, log-probs would differ in their last bits
        if found and parallel.rank() == 0:
            bank.note(f"taking up {len(found)} of {len(prompts)} groups of step {step + 1} that were generated before")
        return prompts, {"found": found, "keep": functools.partial(bank.add, step)}

    def _finished(self, step: int) -> ScoredRollout:
        """The rollout of a step that was begun."""
        rollout = self._ahead[step]
        if isinstance(rollout, InFlightRollout):
            behind = {later: self._ahead.pop(later) for later in sorted(self._ahead) if later > step}
            del self._ahead[step]  # lost, as those behind it, if a stop breaks off the wait
            rollout = self._ahead[step] = self._scored(step, self.collector.finish(rollout))
            self._ahead |= behind
        return rollout

    def _scored(self, step: int, groups: list[Group]) -> ScoredRollout:
        """What the collector has just returned for a step, with what it knows of it."""
        collector = self.collector
        for i in range(prompts_drawn(self.config)):
            self.buffer.drawn((step, i))
        for name, seconds in collector.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return ScoredRollout(groups, collector.lengths, collector.tally, collector.metrics)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        spans.timed(name, start, end)
