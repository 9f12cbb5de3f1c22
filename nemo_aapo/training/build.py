"""From a job to its parts: what generates and judges completions, and on top of it what trains on them.

build_rollouts(job, ...)             policy, engine, scorer, prompts, reference rewards, validation
build_training(job, ...)             the same, and gradient buffers, optimizer, learner, checkpoints: a trainer
build_training(job, rewards=..., ...)    with parts of your own
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from nemo_aapo.algorithms.base import Algorithm
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.checkpoint.checkpointer import Checkpointer
from nemo_aapo.config import Config, digests_of_run, pad_multiple
from nemo_aapo.config.schema import RewardRunnerConfig
from nemo_aapo.data.loading import build_sampler
from nemo_aapo.data.prompts import PromptSet
from nemo_aapo.data.tokenizer import load_text
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.distributed.device import device
from nemo_aapo.engines.base import BackgroundEngine, RolloutEngine
from nemo_aapo.engines.build import build_engine
from nemo_aapo.errors import ConfigError
from nemo_aapo.evaluation.validation import Validator
from nemo_aapo.learner.learner import Learner
from nemo_aapo.learner.policy import MegatronPolicy
from nemo_aapo.learner.sharing_check import check_shared_prompts
from nemo_aapo.mcore.groups import initialize_model_parallel
from nemo_aapo.mcore.offload import LearnerOffload
from nemo_aapo.prepare.algorithm import with_algorithm
from nemo_aapo.prepare.job import Job
from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.rollout.collector import Collector, RewardScorer
from nemo_aapo.rollout.in_flight import InFlightPipeline
from nemo_aapo.rollout.in_order import InOrderPipeline
from nemo_aapo.rollout.pipeline import RolloutPipeline
from nemo_aapo.rollout.saved.bank import FOLDER as BANK
from nemo_aapo.rollout.saved.bank import RolloutBank
from nemo_aapo.rollout.saved.kept import KeptRollouts
from nemo_aapo.rollout.saved.replay import NoValidation, ReplayedRollouts
from nemo_aapo.run.identity import identity_of
from nemo_aapo.run.names import CHECKPOINTS
from nemo_aapo.run.reporter import Notes, Reporter
from nemo_aapo.text.transformers5 import said
from nemo_aapo.trace.tracer import Tracer
from nemo_aapo.training.build_reference import build_reference, open_reference_store
from nemo_aapo.training.read_data import check_resumed_data, count, left_out, read_data
from nemo_aapo.training.throughput import Throughput
from nemo_aapo.training.trainer import AAPOTrainer
from nemo_aapo.types import SamplingSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Parts(TypedDict, total=False):
    """Parts of one's own, in place of those that the job names."""

    data: PromptSet
    validation_data: PromptSet
    rewards: RewardScorer
    """Scores completions; a ``RewardRunner`` for the job's rewards by default."""
    algorithm: Algorithm
    """The two hooks; what ``algorithm`` of the configuration names by default."""
    engine: Callable[[MegatronPolicy], RolloutEngine]
    """Makes an engine for a policy; by default the one that ``rollout.engine`` names."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """All of a run but its training: generates and judges completions."""

    policy: MegatronPolicy
    pipeline: RolloutPipeline
    validator: Validator

    @property
    def decode(self) -> Callable[[np.ndarray], str]:
        """Token ids -> text."""
        return self.pipeline.collector.decode


@dataclass(frozen=True, slots=True)
class Replay:
    """The same of a run that trains on what another one kept."""

    policy: MegatronPolicy
    pipeline: ReplayedRollouts
    decode: Callable[[np.ndarray], str]
    validator: NoValidation = dataclasses.field(default_factory=NoValidation)


def initialize(config: Config) -> None:
    """Join the job's ranks and cut them into Megatron's groups."""
    initialize_model_parallel(
        tensor_model_parallel_size=config.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.model.pipeline_model_parallel_size,
        expert_model_parallel_size=config.model.expert_model_parallel_size,
        context_parallel_size=config.model.context_parallel_size,
        seed=config.seed,
        timeout_s=config.trainer.distributed_timeout_s,
    )


def with_first_ranks_date(job: Job) -> Job:
    """The job with the day that rank 0 renders prompts with: clocks differ between ranks. Collective."""
    date = parallel.broadcast_from_first_rank(job.config.data.date)
    data = dataclasses.replace(job.config.data, date=date)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, data=data))


def build_training(job: Job, *, reporter: Reporter, stack: contextlib.ExitStack, **parts: Unpack[Parts]) -> AAPOTrainer:
    """A trainer of the job's parts, but for those that are given. Collective.

    Args:
        job: prepared for this machine (``prepare``).
        reporter: where the loop reports to.
        stack: closes what needs closing (reward workers, the reference store, the engine).
        parts: in place of the job's.

    Raises:
        ConfigError, DataError, StoreError: what can't work, on every rank.
    """
    if (own := parts.get("algorithm")) is not None:
        job = dataclasses.replace(job, config=with_algorithm(job.config, own))
    config = job.config
    rollouts: Rollouts | Replay
    if config.rollout.replay is None:
        rollouts = build_rollouts(job, reporter=reporter, stack=stack, trains=True, **parts)
    else:
        rollouts = _build_replay(job, reporter, parts.get("data"))
    objective = Objective.of(config.algorithm, config.rollout.max_new_tokens, own)
    learner = build_learner(rollouts.policy, objective)
    return AAPOTrainer(
        config=config,
        policy=rollouts.policy,
        rollouts=rollouts.pipeline,
        objective=objective,
        learner=learner,
        validator=rollouts.validator,
        checkpoints=_checkpointer(config),
        kept=KeptRollouts(config, learner, rollouts.decode, reporter.note),
        throughput=Throughput(config, objective.learns_without_advantage),
        tracer=Tracer(Path(config.run.dir), config.trace.steps, reporter.note),
        reporter=reporter,
    )


def build_rollouts(
    job: Job,
    *,
    reporter: Notes,
    stack: contextlib.ExitStack,
    trains: bool = False,
    new_store_key: bool = False,
    **parts: Unpack[Parts],
) -> Rollouts:
    """What generates and judges the job's completions. Collective.

    Args:
        job, reporter, stack, parts: as ``build_training``.
        trains: the policy will be updated: it has gradient buffers, an optimizer, and the reference's weights.
        new_store_key: take a named reference store even if it holds nothing but other runs' rewards.
    """
    config = job.config
    text = load_text(config.model.path, job.shape.vocab_size, trust_remote_code=config.model.trust_remote_code)
    scorer = build_scorer(job.rewards, config.reward_runner, stack, parts.get("rewards"))
    given = parts.get("data"), parts.get("validation_data")
    data, validation_data = read_data(config, text.tokenizer, scorer, *given, reporter.note)
    for name, prompts in (("training", data), ("validation", validation_data)):
        reporter.note(f"{count(prompts)} {name} prompts from {prompts.path}{left_out(config, prompts)}")
    sampler = build_sampler(config, data)
    if trains:
        check_resumed_data(config, sampler)
    sampling = sampling_of(config, text.end_tokens)
    if len(text.end_tokens) > 1:
        reporter.note(f"completions end with one of {text}")
    key, store = open_reference_store(config, sampling, scorer, reporter, stack, new_store_key)
    reporter.note(
        f"loading {config.model.path} ({job.shape.architecture}) into Megatron{said(Path(config.model.path))}"
    )
    policy = build_policy(job, trains=trains)
    make_engine = parts.get("engine")
    engine = make_engine(policy) if make_engine else build_engine(config, policy, job.shape, text.decode)
    stack.callback(engine.close)
    if trains and (depth := config.rollout.async_depth) and not isinstance(engine, BackgroundEngine):
        reporter.note(
            f"rollout.async_depth={depth}: without rollout servers the learner waits while it generates: the results "
            "are those of servers, and no time is gained"
        )
    if trains and (lag := config.rollout.max_lag) is not None:
        reporter.note(
            f"rollout.max_lag={lag}: which groups a step trains on, and which policy samples a token, depend on how "
            "fast servers and learner are: two runs differ. A run that goes on after a kill repeats what it had made"
        )
    if config.rollout.engine == "plain":
        reporter.note("rollout.engine=plain: each token takes a forward pass over all before it, so rollouts are slow")
    collector = Collector(engine, scorer, text.decode)
    if config.rollout.offload_learner and trains:
        optimization = policy.optimization
        collector.offload = LearnerOffload(optimization.model, optimization.optimizer, reporter.note)
    kind = InOrderPipeline if config.rollout.max_lag is None else InFlightPipeline
    pipeline = kind(
        config=config,
        policy=policy,
        collector=collector,
        sampling=sampling,
        prompts=data.prompts,
        sampler=sampler,
        reference=build_reference(config, collector, sampling, key, store),
        bank=_bank(config, reporter.note) if trains and config.rollout.bank != "off" else None,
    )
    stop = reporter.stop_requested if isinstance(reporter, Reporter) else bool
    return Rollouts(policy, pipeline, _validator(config, collector, validation_data, sampling, stop))


def _build_replay(job: Job, reporter: Notes, data: PromptSet | None) -> Replay:
    """A policy and its data, without engine, rewards and reference store."""
    config = job.config
    text = load_text(config.model.path, job.shape.vocab_size, trust_remote_code=config.model.trust_remote_code)
    data, _ = read_data(config, text.tokenizer, None, data, note=reporter.note)
    sampler = build_sampler(config, data)
    check_resumed_data(config, sampler)
    reporter.note(f"training on the rollouts that {config.rollout.replay} kept, without an engine")
    policy = build_policy(job, trains=True)
    return Replay(policy, ReplayedRollouts(config, data.prompts, sampler), text.decode)


# ---------------------------------------------------------------- parts


def build_policy(job: Job, *, trains: bool) -> MegatronPolicy:
    """The policy with the base model's weights."""
    policy = MegatronPolicy(job.config, job.shape)
    if job.config.model.share_prompts and device().type == "cuda":
        agree(lambda: check_shared_prompts(policy.module))
    if trains:
        policy.prepare_training()
        if job.config.algorithm.compares_with_reference:
            policy.keep_reference()
    return policy


def build_learner(policy: MegatronPolicy, objective: Objective) -> Learner:
    """What trains the policy, or only compares its log-probs with an engine's."""
    config = policy.config
    return Learner(
        policy,
        objective,
        config.max_tokens_per_microbatch,
        config.algorithm.updates_per_rollout,
        pad_multiple=pad_multiple(config),
        packed=bool(config.model.sequence_packing),
        share_prompts=bool(config.model.share_prompts),
    )


def build_scorer(
    rewards: Sequence[tuple[Reward, float]],
    runner: RewardRunnerConfig,
    stack: contextlib.ExitStack,
    given: RewardScorer | None = None,
) -> RewardScorer | None:
    """What judges completions, on this model-parallel group's source rank; None on its other ranks.

    Args:
        rewards: with their weights.
        given: in place of a runner of these rewards.
    """
    if given is not None:
        return given if parallel.is_model_parallel_source() else None

    def make() -> RewardRunner | None:
        if not parallel.is_model_parallel_source():
            return None
        try:
            made = RewardRunner(rewards, runner.workers, runner.timeout_s)
        except ValueError as error:
            raise ConfigError(f"rewards, reward_runner: {error}") from error
        return stack.enter_context(made)

    return agree(make)


def sampling_of(config: Config, end_tokens: tuple[int, ...]) -> SamplingSpec:
    """How policy and reference are sampled in training."""
    rollout = config.rollout
    return SamplingSpec(rollout.temperature, rollout.max_new_tokens, end_tokens, stop_strings=rollout.stop_strings)


def _validator(
    config: Config, collector: Collector, data: PromptSet, sampling: SamplingSpec, stop: Callable[[], bool]
) -> Validator:
    validation = config.validation
    spec = dataclasses.replace(sampling, min_new_tokens=validation.min_new_tokens)
    return Validator(
        collector=collector,
        prompts=data.prompts[: validation.max_prompts],
        reward=validation.reward,
        greedy=dataclasses.replace(spec, temperature=0.0),
        sampled=dataclasses.replace(spec, temperature=validation.temperature, top_p=validation.top_p),
        samples=validation.samples,
        seed=config.seed,
        stop=stop,
    )


def _bank(config: Config, note: Callable[[str], None]) -> RolloutBank:
    run = digests_of_run(config, identity_of(config))
    return RolloutBank(Path(config.run.dir) / BANK, run, parallel.data_parallel_rank(), note)


def _checkpointer(config: Config) -> Checkpointer:
    return Checkpointer(
        Path(config.run.dir) / CHECKPOINTS,
        digests_of_run(config, identity_of(config)),
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        background=config.checkpoint.async_save,
        timeout_s=config.trainer.distributed_timeout_s,
    )
