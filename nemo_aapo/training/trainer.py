"""The loop, and nothing else: AAPOTrainer knows its parts by what they do.

    resume -> [ fill reference -> generate -> parity -> advantages -> update -> refit -> log -> validate -> save ] ...

With ``rollout.async_depth`` the refit comes before a step's completions are waited for, and those of later steps are
generated meanwhile (``rollout/pipeline.py``).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.checkpoint.schedule import SaveSchedule
from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.lost_ranks import lost_ranks_reported
from nemo_aapo.errors import CheckpointError, Interrupted, NonFiniteError, RewardError, first_line
from nemo_aapo.rollout.saved.kept import KeptGroup
from nemo_aapo.rollout.scored import rows_of_all_ranks
from nemo_aapo.run.reporter import Reporter
from nemo_aapo.run.step_metrics import GroupTokens, group_numbers, group_tokens, step_metrics
from nemo_aapo.trace import spans
from nemo_aapo.training.advantages import final_advantages
from nemo_aapo.training.parity import ParityGate
from nemo_aapo.training.parts import Checkpoints, Kept, Learner, Policy, Rollouts, Throughput, Tracer, Validator
from nemo_aapo.types import Group
from nemo_aapo.utils.job import seconds_since_start

BROKEN_OFF = "validation/broken_off"
"""Among a checkpoint's metrics: the validation of its step is still to be made."""


class AAPOTrainer:
    """Trains a policy; every part can be replaced by one that does the same job.

    ``fit()`` is collective: all ranks of the job call it, with parts made alike.
    """

    def __init__(
        self,
        *,
        config: Config,
        policy: Policy,
        rollouts: Rollouts,
        objective: Objective,
        learner: Learner,
        validator: Validator,
        checkpoints: Checkpoints,
        kept: Kept,
        throughput: Throughput,
        tracer: Tracer,
        reporter: Reporter,
    ) -> None:
        """``training.build.build_training`` makes all of these for a job, and takes replacements."""
        self.config, self.policy, self.rollouts = config, policy, rollouts
        self.objective, self.learner, self.validator = objective, learner, validator
        self.checkpoints, self.kept = checkpoints, kept
        self.throughput, self.tracer, self.reporter = throughput, tracer, reporter
        self.parity = ParityGate(config.rollout, learner)
        self.step = 0
        """Training steps done."""
        self.schedule = SaveSchedule(config.checkpoint, elapsed=seconds_since_start())
        self._saved = 0  # the step of the newest checkpoint
        self._latest: dict[str, float] = {}  # metrics of the last step, and of its validation if it has one
        self._generated: list[GroupTokens] = []  # for the step, on this rank
        self._left_out: dict[str, float] = {}  # metrics of what the step does not train on
        self._doing = "the start"

    # ------------------------------------------------------------------ the loop

    def fit(self) -> bool:
        """Train up to ``trainer.max_steps``, going on from the last checkpoint if there is one.

        Returns:
            True if the run is complete, False if a stop signal ended it early; a checkpoint is there either way, unless
            the signal came before the end of the first step.

        Raises:
            NonFiniteError: loss or gradient were not finite; the last good checkpoint is untouched.
            ParityError: engine and learner disagreed before this process's first step.
            LostRankError: another rank is gone; training goes on from the last checkpoint.
            RewardError: nothing can be scored any more; all steps that were made are in a checkpoint.
        """
        with (
            lost_ranks_reported(lambda: self._doing),
            contextlib.closing(self.checkpoints),
            contextlib.closing(self.tracer),
        ):
            try:
                with contextlib.suppress(Interrupted):  # by a stop: nothing of the next step was taken up
                    self._run_steps(stopping=self._begin())
            except RewardError:  # no fault of the policy, whose steps are worth keeping until the reward is mended
                self._save_rest()
                raise
            self._save_rest()
            return self.step >= self.config.trainer.max_steps and BROKEN_OFF not in self._latest

    def _run_steps(self, *, stopping: bool) -> None:
        while self.step < self.config.trainer.max_steps and not stopping:
            self.tracer.begin(self.step + 1)
            if not self._fill_reference():  # a stop signal came meanwhile
                break
            self.train_step()
            if self._due(self.config.trainer.val_check_interval):
                self._validate()
            stopping, save_now = self._stop_or_save()
            if save_now:
                self._save()
            self.tracer.end()

    def train_step(self) -> None:
        """One step of ``fit``, without what stands around it: reference rewards, validation, checkpoints."""
        start = time.perf_counter()
        self._run_ahead()  # before it is waited: an engine that has ended its part goes on meanwhile
        groups = self._generate()
        with contextlib.suppress(Interrupted):  # by a stop: the loop ends with this step
            self._run_ahead()  # with prompts that this step's completions have decided
        version = self.policy.version
        with self._phase(f"step {self.step + 1}, parity"):
            self.parity.check_first_step(groups, version)
        groups = self._with_advantages(groups)
        with self._phase(f"step {self.step + 1}, kept rollouts"):
            kept = self.kept.choose(self.step, groups)  # by the policy as it stands before the update
        began = time.perf_counter()
        metrics = self._update(groups)
        updated = time.perf_counter()
        spans.timed("train", began, updated)
        if not self.rollouts.runs_ahead:
            with contextlib.suppress(Interrupted):
                self._refit()
        self.step += 1
        self._log(groups, kept, version, metrics, updated - began, start)

    # ------------------------------------------------------------------ a step's verbs

    def _generate(self) -> list[Group]:
        """This rank's groups of the step, with rewards and reference rewards."""
        with self._phase(f"step {self.step + 1}, rollout", "groups"):
            return self.rollouts.generate(self.step)

    def _run_ahead(self) -> None:
        """Where rollouts run ahead, have those begun that the policy draws before this step changes it."""
        if self.rollouts.runs_ahead:
            self._refit()
            with self._phase(f"step {self.step + 1}, rollout", "next steps' rollouts begin"):
                self.rollouts.begin(self.step)

    def _with_advantages(self, groups: list[Group]) -> list[Group]:
        """The groups that are trained on, with their final advantages: of those generated, perhaps not all."""
        with spans.phase("advantages"):
            self._generated = list(map(group_tokens, groups))
            taken, self._left_out = final_advantages(self.objective, self.config, self.step, groups)
        return taken

    def _update(self, groups: list[Group]) -> dict[str, float]:
        """The learner's optimizer steps; a batch that leads to numbers that are not finite is kept for people."""
        with self._phase(f"step {self.step + 1}, train", "update"):
            try:
                return self.learner.update(groups)
            except NonFiniteError as error:
                name = f"failed_step_{self.step + 1:06d}"
                self.reporter.save_rollouts(name, rows_of_all_ranks(groups))  # the error is all ranks'
                raise NonFiniteError(
                    f"step {self.step + 1}: {error}. No weight was changed and no checkpoint written; the batch is in "
                    f"{self.config.run.dir}/rollouts/{name}.jsonl. Lower model.optim.lr, or look at that batch"
                ) from error

    def _refit(self) -> None:
        """The engine gets the policy's weights, where it has others."""
        with self._phase(f"step {self.step + 1}, refit", "weights to the engine"):
            self.rollouts.refit()

    def _log(
        self,
        groups: list[Group],
        kept: list[KeptGroup],
        version: int,
        update: dict[str, float],
        train_s: float,
        start: float,
    ) -> None:
        """Metrics of the step over all ranks, and what is kept of its rollouts.

        Args:
            kept: this rank's part.
            version: of the policy before the update.
            update: the learner's metrics.
            train_s, start: seconds of the update, and when the step began.
        """
        with spans.phase("numbers of all ranks"):
            everyone = parallel.gather_data_parallel((self._generated, list(map(group_numbers, groups)), kept))
            generated, numbers, kept = ([x for part in kind for x in part] for kind in zip(*everyone, strict=True))
        ended = time.perf_counter()
        spans.timed(f"step {self.step}", start, ended, "step")
        seconds = {**self.rollouts.seconds, "train": train_s, "step": ended - start}
        metrics = {
            **step_metrics(numbers, version, self.config.validation.reward),
            **self.objective.metrics(numbers, step=self.step - 1, max_steps=self.config.trainer.max_steps),
            **update,
            **self.rollouts.metrics,
            **self._left_out,
            "epoch": self.rollouts.epochs(self.step),
            **self.throughput.metrics(generated, numbers, seconds),
            **{f"time/{name}": value for name, value in seconds.items()},
        }
        self._latest = metrics
        with spans.phase("log"):
            self.reporter.log_step(self.step, metrics)
            self.kept.write(self.step, kept)
        if warning := self.parity.watch(self.step, metrics):
            self.reporter.note(warning)

    # ------------------------------------------------------------------ around it

    def _begin(self) -> bool:
        """Resume, and validate where that is due; whether to stop already."""
        resumed = self._resume()
        due = self._latest.pop(BROKEN_OFF, 0.0) if resumed else self.config.trainer.val_check_interval
        return bool(due) and not self._validate()

    def _resume(self) -> bool:
        """Go on from the last checkpoint; False without one."""
        state = self.checkpoints.resume(self.policy, self.config.checkpoint.resume)
        if state is not None:
            try:
                self.step, self._latest = int(state["step"]), dict(state["metrics"])
                self._saved = self.step
                self.rollouts.load_state_dict(state)
            except (KeyError, TypeError) as error:
                said = f"its trainer state is of another version ({first_line(error)})"
                raise CheckpointError(f"{self.checkpoints.resumed_from}: {said}") from error
            if (checkpoint := self.checkpoints.resumed_from) is not None:
                self.rollouts.load_pending(checkpoint, self.step)
        self.rollouts.recover()
        self.reporter.begin(-1 if state is None else self.step, validated=BROKEN_OFF not in self._latest)
        if state is not None and (warning := self.rollouts.drawn_later()):
            self.reporter.note(f"warning: {warning}")
        self._refit()  # a new engine has the base model's weights
        with self._phase(f"step {self.step + 1}, parity"):
            self.parity.check(self.rollouts.parity_sample())
        return state is not None

    def _fill_reference(self) -> bool:
        """Have the next step's reference rewards at hand; False if a stop signal came meanwhile."""
        with self._phase(f"the reference rewards of step {self.step + 1}"):
            complete = self.rollouts.fill_reference(
                self.step,
                lambda done, total: self.reporter.phase("reference rewards", done, total),
                lambda: self.reporter.stop_requested() or self.schedule.time_is_up(self.checkpoints.seconds),
            )
        self.schedule.step_begins()
        return complete

    def _validate(self) -> bool:
        """Measure the policy; False if a stop broke it off, which a resumed run makes up for.

        Raises:
            RewardError: nothing could be scored; a resumed run makes up for it, too.
        """
        try:
            with self._phase(f"step {self.step + 1}, rollout", "rollouts under way"):
                self.rollouts.settle()
            self._refit()
            with self._phase(f"the validation after step {self.step}"):
                self.reporter.phase("validating", 0, len(self.validator.prompts))
                metrics, samples = self.validator.run()
                self._latest |= metrics
                self.reporter.log_validation(self.step, metrics, samples)
        except (Interrupted, RewardError) as error:
            self._latest[BROKEN_OFF] = 1.0
            if isinstance(error, RewardError):
                raise
            return False
        return True

    def _stop_or_save(self) -> tuple[bool, bool]:
        """Whether to end after this step, and whether to save now; the same on all ranks.

        Raises:
            CheckpointError: of a save in the background that has failed.
        """
        self.schedule.step_done()
        stopping, due, failed = parallel.any_rank(
            self.reporter.stop_requested() or self.schedule.time_is_up(self.checkpoints.seconds),
            self.schedule.time_for_a_checkpoint(),
            self.checkpoints.failed(),
        )
        if failed:
            self._wait_for_checkpoint()
        return stopping, stopping or due or any(map(self._due, self.schedule.intervals(self.config.trainer)))

    def _save(self) -> None:
        with self._phase(f"step {self.step + 1}, rollout", "rollouts under way"):
            rollouts = self.rollouts.pending_files()
        with self._phase(f"the checkpoint of step {self.step}"):
            self.reporter.note(f"saving a checkpoint at step {self.step}")
            self.kept.wait()
            self.reporter.sync()
            state = {
                "step": self.step,
                "policy_version": self.policy.version,
                "seed": self.config.seed,  # it names every random stream; the loop uses no global generator
                **self.rollouts.state_dict(),
                "metrics": {k: v for k, v in self._latest.items() if math.isfinite(v) and not k.startswith("time/")},
            }
            self.checkpoints.save(self.step, self.policy, state, rollouts)
            self.rollouts.checkpointed(self._saved)  # the one before: this one may be written in the background
            self._saved = self.step
            self.schedule.saved()

    def _save_rest(self) -> None:
        """Have the last step in a checkpoint that is whole on the disk, unless a stop broke off what belongs to it."""
        if self.step > self._saved:
            try:
                self._save()
            except Interrupted:  # what would be drawn with later weights is rather drawn with the same ones again
                self.reporter.note(f"completions of the next steps were not waited for: step {self._saved} is kept")
        self._wait_for_checkpoint()

    def _wait_for_checkpoint(self) -> None:
        with self._phase(f"the checkpoint of step {self.step}"):
            self.checkpoints.wait()
            self.kept.wait()
        self.rollouts.checkpointed(self._saved)

    def _due(self, interval: int) -> bool:
        return bool(interval) and (self.step % interval == 0 or self.step >= self.config.trainer.max_steps)

    @contextlib.contextmanager
    def _phase(self, name: str, span: str = "") -> Iterator[None]:
        """Inside, this rank is at ``name``; after an error too, as who reports a lost rank asks for it outside.

        Args:
            span: what a trace calls it; by default ``name`` without its step.

        Raises:
            NonFiniteError: log-probs are not finite: the update before was, what it led to is not.
        """
        before, self._doing = self._doing, name
        try:
            with spans.phase(span or name.rpartition(", ")[2]):
                yield
        except FloatingPointError as error:
            raise NonFiniteError(f"{name}: {error}. No checkpoint was written") from error
        self._doing = before
