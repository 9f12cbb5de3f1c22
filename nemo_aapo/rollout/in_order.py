"""Rollouts in order: generated when their step comes, or L = ``rollout.async_depth`` steps ahead of it.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_aapo.config import Config
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_first_rank
from nemo_aapo.engines.base import BackgroundEngine
from nemo_aapo.errors import Interrupted
from nemo_aapo.rollout.buffer import InOrder, State
from nemo_aapo.rollout.collector import BegunRollout
from nemo_aapo.rollout.pipeline import RolloutPipeline
from nemo_aapo.rollout.saved import pending
from nemo_aapo.rollout.saved.bank import completions_of
from nemo_aapo.rollout.scored import Banking, ScoredRollout, mean_lengths
from nemo_aapo.rollout.spread import own_shard
from nemo_aapo.rollout.unscored import TOTAL
from nemo_aapo.types import Group, Prompt


class InOrderPipeline(RolloutPipeline):
    """Step k trains on the groups of step k; see ``RolloutPipeline`` for what its methods do and raise."""

    def __init__(self, *, config: Config, **parts: Any) -> None:
        """As ``RolloutPipeline``."""
        super().__init__(InOrder(config.rollout.async_depth), config=config, **parts)
        self._ahead: dict[int, BegunRollout | ScoredRollout] = {}  # by step: under way, or in hand
        self._banked: dict[int, list[bytes]] = {}  # by step: records of the process before this one

    # ------------------------------------------------------------------ a step

    def generate(self, step: int) -> list[Group]:
        """This rank's groups of the step, which are waited for where they were begun."""
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

    def not_begun(self) -> int | None:
        """Of steps whose prompts the sampler knows."""
        end = min(self.sampler.step + self.config.rollout.async_depth, self.config.trainer.max_steps)
        steps = range(self.sampler.step, end)
        return next((step for step in steps if step not in self._ahead and self.sampler.knows(step)), None)

    def settle(self) -> list[ScoredRollout]:
        """Wait for what is under way, so that the engine is free; the rollouts of the steps to come, in order.

        Raises:
            Interrupted: on all ranks; a stop broke off the wait, and the first that was not there is lost, with those
                behind it.
        """
        return [self._finished(step) for step in sorted(self._ahead)]

    def pending_files(self) -> dict[str, bytes]:
        """Rollouts made and not yet trained on, as files for a checkpoint; rank 0's count.

        All that were begun are waited for: the weights that would go on with them are gone when the run is resumed.

        Raises:
            Interrupted: on all ranks; a stop broke off what draws them, so that a run which went on from here would
                draw them with later weights.
        """
        if self.not_begun() is not None:
            raise Interrupted("completions of the steps to come were not all begun")
        # What could not be scored at all is better sampled anew.
        kept = list(itertools.takewhile(lambda r: not r.tally.completions or r.tally.scored[TOTAL], self.settle()))
        if not kept:
            return {}
        parts = parallel.gather_data_parallel([rollout.groups for rollout in kept])
        everyone = [group for of_step in zip(*parts, strict=True) for part in of_step for group in part]
        return {pending.FILE_NAME: pending.pack(everyone) if parallel.rank() == 0 else b""}

    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Take up the rollouts that a checkpoint holds, whole steps of them."""
        path = checkpoint / pending.FILE_NAME
        content = path.read_bytes() if parallel.rank() == 0 and path.exists() else None
        if (content := parallel.broadcast_from_first_rank(content)) is not None:
            self._taken_up = True
            size = prompts_drawn(self.config)
            steps = range(step, step + pending.count(content) // size)
            groups = pending.unpack(content, [prompt for later in steps for prompt in self.prompts(later)])
            for i, later in enumerate(steps):
                of_step = groups[i * size : (i + 1) * size]
                for k in range(size):
                    self.buffer.restore((later, k), max(0, later - self.config.rollout.async_depth))
                self._ahead[later] = ScoredRollout(of_step[own_shard(size)], mean_lengths(of_step))

    def recover(self) -> None:
        """Have what the bank holds at hand for when its steps begin."""
        if (bank := self.bank) is not None:
            self._banked = on_first_rank(bank.recover)
            self._taken_up |= bool(self._banked)

    def checkpointed(self, step: int) -> None:
        """Let go of what a checkpoint that is whole on the disk holds."""
        if self.bank is not None and step:
            if step >= self.config.trainer.max_steps:
                self.bank.remove()
            else:
                self.bank.forget(before=step + self.config.rollout.async_depth)

    # ------------------------------------------------------------------ parts

    def _observe(self, step: int, groups: Sequence[Group]) -> None:
        """Tell a sampler that goes by accuracy how many completions of each prompt were right, of those judged."""
        if not self.sampler.observes:
            return
        verdicts = [group.right(self.config.validation.reward) for group in groups]
        mine = [(int((right == 1).sum()), int((~np.isnan(right)).sum())) for right in verdicts]
        counts = [count for part in parallel.gather_data_parallel(mine) for count in part]
        self.sampler.observe(step, dict(zip(self.sampler.indices(step), counts, strict=True)))

    def _begun(self, step: int) -> BegunRollout:
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
        if isinstance(rollout, BegunRollout):
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
