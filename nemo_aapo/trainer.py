"""The loop, and nothing else: AAPOTrainer knows its parts by what they do.

prompts -> rollout -> rewards -> advantages -> batches -> log-probs + loss -> optimizer step -> refit -> checkpoint
                         ^
             reference-reward store
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from nemo_aapo import parallel
from nemo_aapo.algorithms import Algorithm
from nemo_aapo.config import Config
from nemo_aapo.data.prompts import PromptSet
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.errors import RunError
from nemo_aapo.evaluate import Validator
from nemo_aapo.experiment import rollout_rows
from nemo_aapo.policy.learner import Learner
from nemo_aapo.policy.megatron import MegatronPolicy, NonFiniteError
from nemo_aapo.rollout.collect import Collector, share
from nemo_aapo.rollout.engine import RolloutEngine
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.schedule import SaveSchedule
from nemo_aapo.seeds import stream_seed
from nemo_aapo.statistics import group_numbers, step_metrics
from nemo_aapo.types import Group, SamplingSpec


class ParityError(RunError):
    """Engine and learner disagree on the log-probs of the same tokens."""


class Reporter(Protocol):
    """Where the loop reports to. Rank 0 has ``experiment.Experiment``; the other ranks report to nobody."""

    def begin(self, step: int) -> None: ...
    def phase(self, name: str, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...
    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...
    def log_validation(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None: ...
    def save_rollouts(self, name: str, samples: list[dict[str, Any]]) -> None: ...
    def stop_requested(self) -> bool: ...


class Checkpoints(Protocol):
    """What the loop needs of ``checkpoint.Checkpointer``."""

    def resume(self, policy: Any, mode: Any) -> dict[str, Any] | None: ...
    def save(self, step: int, policy: Any, trainer_state: dict[str, Any]) -> Any: ...


class AAPOTrainer:
    """Trains a policy; every part can be replaced by one that does the same job.

    ``fit()`` is collective: all ranks of the job call it, with parts made alike.
    """

    def __init__(
        self,
        *,
        config: Config,
        policy: MegatronPolicy,
        engine: RolloutEngine,
        collector: Collector,
        sampling: SamplingSpec,
        data: PromptSet,
        sampler: PromptSampler,
        algorithm: Algorithm,
        learner: Learner,
        reference: ReferenceRewards | None,
        validator: Validator,
        checkpoints: Checkpoints,
        reporter: Reporter,
    ) -> None:
        """``assemble.build_trainer`` makes all of these from a configuration, and takes replacements."""
        self.config, self.policy, self.engine = config, policy, engine
        self.collector, self.sampling = collector, sampling
        self.data, self.sampler, self.algorithm, self.learner = data, sampler, algorithm, learner
        self.reference, self.validator = reference, validator
        self.checkpoints, self.reporter = checkpoints, reporter
        self.step = 0
        """Training steps done."""
        self.schedule = SaveSchedule(config.checkpoint)
        self._latest: dict[str, float] = {}  # metrics of the last step and the last validation
        self._gated = False  # whether engine and learner were compared since this process began
        self._doing = "the start"
        self._seconds: dict[str, float] = {}

    # ------------------------------------------------------------------ the loop

    def fit(self) -> bool:
        """Train up to ``trainer.max_steps``, going on from the last checkpoint if there is one.

        Returns:
            True if the run is complete, False if a stop signal ended it early; a checkpoint is there either way.

        Raises:
            NonFiniteError: loss or gradient were not finite; the last good checkpoint is untouched.
            ParityError: engine and learner disagreed before the first step.
            LostRankError: another rank is gone; training goes on from the last checkpoint.
        """
        with parallel.lost_ranks_reported(lambda: self._doing):
            saved = self._start()
            while self.step < self.config.trainer.max_steps:
                self._train_step()
                if self._due(self.config.trainer.val_check_interval):
                    self._validate()
                self.schedule.step_done()
                stopping = parallel.any_rank(self.reporter.stop_requested() or self.schedule.time_is_up())
                due = parallel.any_rank(self.schedule.time_for_a_checkpoint())
                if stopping or due or self._due(self.config.checkpoint.save_interval):
                    self._save()
                    saved = self.step
                if stopping:
                    return self.step == self.config.trainer.max_steps
            if saved != self.step:
                self._save()
            return True

    def _start(self) -> int:
        """Resume or begin; returns the step of the last checkpoint, -1 without one."""
        state = self.checkpoints.resume(self.policy, self.config.checkpoint.resume)
        if state is not None:
            self.step = state["step"]
            self.sampler.load_state_dict(state["sampler"])
            self._latest = dict(state["metrics"])
            self.engine.update_weights(self.policy.named_weights(), self.policy.version)
        self.reporter.begin(self.step if state is not None else -1)
        if state is None and self.config.trainer.val_check_interval:
            self._validate()
        if self.reference is not None and not self.reference.online:
            self._fill_reference()
        return self.step if state is not None else -1

    def _train_step(self) -> None:
        start = time.perf_counter()
        self._seconds = {}
        groups = self._rollout()
        if not self._gated:
            self._parity_gate(groups)
        with self._timed("train"):
            metrics = self._update(groups)
        with self._timed("refit"):
            self.engine.update_weights(self.policy.named_weights(), self.policy.version)
        self.step += 1
        self.sampler.step = self.step
        numbers = [n for part in parallel.gather_data_parallel([group_numbers(g) for g in groups]) for n in part]
        seconds = {"reference": 0.0, **self._seconds, "step": time.perf_counter() - start}
        tokens = sum(int(n.lengths.sum()) for n in numbers)
        metrics = {
            **step_metrics(numbers),
            **metrics,
            "tokens_per_second": tokens / seconds["step"],
            "epoch": self.step * self.config.prompts_per_step / len(self.data.prompts),
            **{f"time/{name}": value for name, value in seconds.items()},
        }
        self._latest |= metrics
        self.reporter.log_step(self.step, metrics)
        self._watch_parity(metrics)

    def _rollout(self) -> list[Group]:
        """This rank's groups of the step, with rewards, reference rewards and advantages."""
        prompts = [self.data.prompts[i] for i in self.sampler.indices(self.step)]
        with self._timed("reference"):
            reference = self.reference.rewards(prompts, self.step) if self.reference is not None else {}
        seeds = [
            [stream_seed(self.config.seed, "rollout", self.step, i, j) for j in range(self.config.group_size)]
            for i in range(len(prompts))
        ]
        self._doing = f"step {self.step + 1}, rollout"
        try:
            groups = self.collector.collect(prompts, self.sampling, seeds)
        except FloatingPointError as error:  # the update before was finite, what it led to is not
            raise NonFiniteError(f"step {self.step + 1}, rollout: {error}. No checkpoint was written") from error
        self._seconds |= self.collector.seconds
        groups = [group.replace(reference_rewards=reference.get(group.prompt.id)) for group in groups]
        first = share(len(prompts)).start
        pair_seeds = [stream_seed(self.config.seed, "pairs", self.step, first + i) for i in range(len(groups))]
        return with_advantages(self.algorithm, groups, pair_seeds)

    def _update(self, groups: list[Group]) -> dict[str, float]:
        try:
            return self.learner.update(groups)
        except NonFiniteError as error:
            name = f"failed_step_{self.step + 1:06d}"
            self.reporter.save_rollouts(name, rollout_rows(groups))
            raise NonFiniteError(
                f"step {self.step + 1}: {error}. No weight was changed and no checkpoint written; the batch is in "
                f"{self.config.run.dir}/rollouts/{name}.jsonl. Lower model.optim.lr, or look at that batch"
            ) from error

    # ------------------------------------------------------------------ around it

    def _due(self, interval: int) -> bool:
        last = self.step == self.config.trainer.max_steps
        return bool(interval) and (self.step % interval == 0 or last)

    def _validate(self) -> None:
        self._doing = f"the validation after step {self.step}"
        self.reporter.phase("validating", 0, len(self.validator.prompts))
        metrics, samples = self.validator.run()
        self._latest |= metrics
        self.reporter.log_validation(self.step, metrics, samples)

    def _fill_reference(self) -> None:
        """Draw the reference rewards of exactly the prompts that the rest of the run uses."""
        steps = range(self.step, self.config.trainer.max_steps)
        wanted = dict.fromkeys(i for step in steps for i in self.sampler.indices(step))
        self.reference.prepare(
            [self.data.prompts[i] for i in wanted],
            lambda done, total: self.reporter.phase("reference rewards", done, total),
        )

    def _parity_gate(self, groups: list[Group]) -> None:
        """Before the first update of this process the engine's log-probs must be the learner's."""
        if complaint := self._disagreement(self.learner.parity(groups)):
            raise ParityError(f"before the first step: {complaint}")
        self._gated = True

    def _watch_parity(self, metrics: dict[str, float]) -> None:
        complaint = self._disagreement(metrics)
        if complaint and self.config.rollout.on_parity_error == "stop":
            raise ParityError(f"step {self.step}: {complaint}. The last checkpoint is as it was")
        if complaint:
            self.reporter.note(f"warning: step {self.step}: {complaint}")

    def _disagreement(self, parity: dict[str, float]) -> str:
        """What is wrong with the parity of engine and learner; empty if it is within the limits or not known."""
        error, kl = parity["parity/mult_prob_error"], parity["parity/gen_kl"]
        error_limit, kl_limit = self.config.rollout.max_parity_error, self.config.rollout.max_gen_kl
        if not (error > error_limit or kl > kl_limit):
            return ""
        return (
            f"engine and learner disagree on the same tokens: multiplicative probability error {error:.4f} "
            f"(rollout.max_parity_error={error_limit}), KL {kl:.2e} (rollout.max_gen_kl={kl_limit}). "
            "Look at: rollout.temperature (the same in both?), the model's dtype, stale weights in the engine, the "
            "padded vocabulary"
        )

    def _save(self) -> None:
        self._doing = f"the checkpoint of step {self.step}"
        self.reporter.note(f"saving a checkpoint at step {self.step}")
        state = {
            "step": self.step,
            "policy_version": self.policy.version,
            "sampler": self.sampler.state_dict(),
            "metrics": {k: v for k, v in self._latest.items() if math.isfinite(v) and not k.startswith("time/")},
        }
        self.checkpoints.save(self.step, self.policy, state)
        self.schedule.saved()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._doing = f"step {self.step + 1}, {name}"
        yield
        self._seconds[name] = time.perf_counter() - start


def with_advantages(algorithm: Algorithm, groups: list[Group], pair_seeds: list[int]) -> list[Group]:
    """The groups with their final advantages A*.

    Args:
        pair_seeds: one per group; which stored reference rewards the sampled margin compares with.
    """
    if not groups:
        return []
    rewards = np.stack([group.rewards for group in groups])
    has_reference = groups[0].reference_rewards is not None
    reference = np.stack([group.reference_rewards for group in groups]) if has_reference else None
    advantages = algorithm.advantages(rewards, reference, pair_seeds)
    return [group.replace(advantages=row) for group, row in zip(groups, advantages, strict=True)]
