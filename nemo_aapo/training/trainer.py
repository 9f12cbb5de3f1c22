"""The loop, and nothing else: AAPOTrainer knows its parts by what they do.

prompts -> rollout -> rewards -> advantages -> batches -> log-probs + loss -> optimizer step -> refit -> checkpoint
                         ^
             reference-reward store
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_aapo.algorithms import Algorithm
from nemo_aapo.checkpoint.schedule import SaveSchedule
from nemo_aapo.config import Config
from nemo_aapo.config.schema import Rollout
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import NonFiniteError, ParityError
from nemo_aapo.evaluation.validation import Validator
from nemo_aapo.learner.learner import Learner
from nemo_aapo.learner.policy import MegatronPolicy
from nemo_aapo.rollout.collector import share
from nemo_aapo.rollout.pipeline import RolloutSource
from nemo_aapo.run.experiment import rollout_rows
from nemo_aapo.run.step_metrics import group_numbers, step_metrics
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Group


class Reporter(Protocol):
    """Where the loop reports to: ``reporter.RunReporter``, which on ranks other than 0 says nothing."""

    def begin(self, step: int) -> None: ...
    def phase(self, name: str, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...
    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...
    def log_validation(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None: ...
    def save_rollouts(self, name: str, samples: list[dict[str, Any]]) -> None: ...
    def stop_requested(self) -> bool: ...


class Checkpoints(Protocol):
    """What the loop needs of ``checkpoint.Checkpointer``."""

    seconds: float
    resumed_from: Path | None

    def resume(self, policy: Any, mode: Any) -> dict[str, Any] | None: ...
    def save(
        self, step: int, policy: Any, trainer_state: dict[str, Any], extra_files: Mapping[str, bytes] | None = None
    ) -> Any: ...
    def failed(self) -> bool: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class AAPOTrainer:
    """Trains a policy; every part can be replaced by one that does the same job.

    ``fit()`` is collective: all ranks of the job call it, with parts made alike.
    """

    def __init__(
        self,
        *,
        config: Config,
        policy: MegatronPolicy,
        rollouts: RolloutSource,
        algorithm: Algorithm,
        learner: Learner,
        validator: Validator,
        checkpoints: Checkpoints,
        reporter: Reporter,
    ) -> None:
        """``assemble.build_trainer`` makes all of these from a configuration, and takes replacements."""
        self.config, self.policy, self.rollouts = config, policy, rollouts
        self.algorithm, self.learner, self.validator = algorithm, learner, validator
        self.checkpoints, self.reporter = checkpoints, reporter
        self.step = 0
        """Training steps done."""
        self.schedule = SaveSchedule(config.checkpoint)
        self._latest: dict[str, float] = {}  # metrics of the last step and the last validation
        self._gated = False  # whether engine and learner were compared since this process began
        self._doing = "the start"

    # ------------------------------------------------------------------ the loop

    def fit(self) -> bool:
        """Train up to ``trainer.max_steps``, going on from the last checkpoint if there is one.

        Returns:
            True if the run is complete, False if a stop signal ended it early; a checkpoint is there either way, unless
            the signal came before the end of the first step.

        Raises:
            NonFiniteError: loss or gradient were not finite; the last good checkpoint is untouched.
            ParityError: engine and learner disagreed before the first step.
            LostRankError: another rank is gone; training goes on from the last checkpoint.
        """
        with parallel.lost_ranks_reported(lambda: self._doing), contextlib.closing(self.checkpoints):
            saved = self._start()
            stopping = False
            while self.step < self.config.trainer.max_steps and not stopping:
                if not self._reference_ready():  # a stop signal came while they were drawn
                    break
                self.train_step()
                if self._due(self.config.trainer.val_check_interval):
                    self._validate()
                self.schedule.step_done()
                stopping, due, failed = parallel.any_rank(
                    self.reporter.stop_requested() or self.schedule.time_is_up(self.checkpoints.seconds),
                    self.schedule.time_for_a_checkpoint(),
                    self.checkpoints.failed(),
                )
                if failed:
                    self._wait_for_checkpoint()
                if stopping or due or self._due(self.config.checkpoint.save_interval):
                    self._save()
                    saved = self.step
            if self.step > max(saved, 0):
                self._save()
            self._wait_for_checkpoint()
            return self.step == self.config.trainer.max_steps

    def _start(self) -> int:
        """Resume or begin; returns the step of the last checkpoint, -1 without one."""
        state = self.checkpoints.resume(self.policy, self.config.checkpoint.resume)
        if state is not None:
            self.step = state["step"]
            self.rollouts.sampler.load_state_dict(state["sampler"])
            self.rollouts.collector.lengths.load(state["completion_lengths"])
            self._latest = dict(state["metrics"])
            if self.rollouts.reference is not None:
                self.rollouts.reference.load_state_dict(state["reference"])
            self.rollouts.load(self.checkpoints.resumed_from, self.step)
        self.reporter.begin(self.step if state is not None else -1)
        if state is None and self.config.trainer.val_check_interval:
            self._validate()
        return self.step if state is not None else -1

    def train_step(self) -> None:
        """One step of ``fit``, without what stands around it: resuming, validation, checkpoints."""
        start = time.perf_counter()
        groups = self._rollout()
        if not self._gated and not self._lag(groups):
            self._parity_gate(groups)
        version = self.policy.version
        began = time.perf_counter()
        metrics = self._update(groups)
        self.step += 1
        self.rollouts.sampler.step = self.step
        numbers = [n for part in parallel.gather_data_parallel([group_numbers(g) for g in groups]) for n in part]
        now = time.perf_counter()
        seconds = {**self.rollouts.seconds, "train": now - began, "step": now - start}
        tokens = sum(int(n.lengths.sum()) for n in numbers)
        metrics = {
            **step_metrics(numbers, version),
            **metrics,
            **self.rollouts.metrics,
            "tokens_per_second": tokens / seconds["step"],
            "epoch": self.rollouts.sampler.epochs(self.step),
            **{f"time/{name}": value for name, value in seconds.items()},
        }
        self._latest |= metrics
        self.reporter.log_step(self.step, metrics)
        if not metrics["rollout/lag"]:
            self._watch_parity(metrics)

    def _rollout(self) -> list[Group]:
        """This rank's groups of the step, with rewards, reference rewards and advantages."""
        self._doing = f"step {self.step + 1}, rollout"
        try:
            groups = self.rollouts.groups(self.step)
        except FloatingPointError as error:  # the update before was finite, what it led to is not
            raise NonFiniteError(f"{self._doing}: {error}. No checkpoint was written") from error
        first = share(self.config.prompts_per_step).start
        pair_seeds = [stream_seed(self.config.seed, "pairs", self.step, first + i) for i in range(len(groups))]
        return with_advantages(self.algorithm, groups, pair_seeds)

    def _update(self, groups: list[Group]) -> dict[str, float]:
        self._doing = f"step {self.step + 1}, train"
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
        self._doing = f"step {self.step + 1}, rollout"
        self.rollouts.settle()
        self.rollouts.refit()
        self._doing = f"the validation after step {self.step}"
        self.reporter.phase("validating", 0, len(self.validator.prompts))
        metrics, samples = self.validator.run()
        self._latest |= metrics
        self.reporter.log_validation(self.step, metrics, samples)

    def _reference_ready(self) -> bool:
        """Have the next step's reference rewards at hand; False if a stop signal came while they were drawn."""
        self._doing = f"the reference rewards of step {self.step + 1}"
        return self.rollouts.fill_reference(
            self.step,
            lambda done, total: self.reporter.phase("reference rewards", done, total),
            lambda: self.reporter.stop_requested() or self.schedule.time_is_up(self.checkpoints.seconds),
        )

    def _parity_gate(self, groups: list[Group]) -> None:
        """Before the first update of this process the engine's log-probs must be the learner's."""
        if complaint := disagreement(self.config.rollout, self.learner.parity(groups)):
            raise ParityError(f"before the first step: {complaint}")
        self._gated = True

    def _watch_parity(self, metrics: dict[str, float]) -> None:
        complaint = disagreement(self.config.rollout, metrics)
        if complaint and self.config.rollout.on_parity_error == "stop":
            raise ParityError(f"step {self.step}: {complaint}. The last checkpoint is as it was")
        if complaint:
            self.reporter.note(f"warning: step {self.step}: {complaint}")

    def _lag(self, groups: list[Group]) -> bool:
        """Whether these were drawn by an earlier policy: then engine and learner have to differ."""
        return parallel.any_rank(any(c.policy_version != self.policy.version for g in groups for c in g.completions))[0]

    def _save(self) -> None:
        self._doing = f"step {self.step + 1}, rollout"
        rollouts = self.rollouts.save()
        self._doing = f"the checkpoint of step {self.step}"
        self.reporter.note(f"saving a checkpoint at step {self.step}")
        state = {
            "step": self.step,
            "policy_version": self.policy.version,
            "seed": self.config.seed,  # it names every random stream; the loop draws from no global generator
            "sampler": self.rollouts.sampler.state_dict(),
            "reference": self.rollouts.reference.state_dict() if self.rollouts.reference is not None else None,
            "completion_lengths": self.rollouts.collector.lengths.state(),
            "metrics": {k: v for k, v in self._latest.items() if math.isfinite(v) and not k.startswith("time/")},
        }
        self.checkpoints.save(self.step, self.policy, state, rollouts)
        self.schedule.saved()

    def _wait_for_checkpoint(self) -> None:
        self._doing = f"the checkpoint of step {self.step}"
        self.checkpoints.wait()


def disagreement(limits: Rollout, parity: Mapping[str, float]) -> str:
    """What is wrong with the parity of engine and learner; empty if it is within the limits or not known.

    Args:
        parity: ``parity/mult_prob_error`` and ``parity/gen_kl``, as ``Learner`` returns them.
    """
    error, kl = parity["parity/mult_prob_error"], parity["parity/gen_kl"]
    if not (error > limits.max_parity_error or kl > limits.max_gen_kl):
        return ""
    return (
        f"engine and learner disagree on the same tokens: multiplicative probability error {error:.4f} "
        f"(rollout.max_parity_error={limits.max_parity_error}), KL {kl:.2e} (rollout.max_gen_kl={limits.max_gen_kl}). "
        "Look at: rollout.temperature (the same in both?), the model's dtype, stale weights in the engine, the "
        "padded vocabulary; with an FP8 learner, whose engine draws in bf16: docs/gpu.md"
    )


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
