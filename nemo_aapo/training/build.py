"""The one place that knows all parts: from a configuration to a trainer, and from there to a finished run.

build_trainer(config)                         everything by the configuration
build_trainer(config, data=..., rewards=...)  with parts of your own
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_aapo.algorithms import Algorithm
from nemo_aapo.checkpoint.checkpointer import Checkpointer
from nemo_aapo.config import Config, ModelShape, digests_of_run, pad_multiple
from nemo_aapo.data.loading import attach_endless, build_sampler, load_data
from nemo_aapo.data.prompts import PromptSet
from nemo_aapo.data.tokenizer import load_tokenizer, require_eos, text_decoder
from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import RolloutEngine
from nemo_aapo.engines.build import build_engine
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.errors import ConfigError
from nemo_aapo.evaluation.validation import Validator
from nemo_aapo.launch.local import world_size_of_job
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.cpu import patches as cpu
from nemo_aapo.models import directory as model_dir
from nemo_aapo.rewards import reward_of
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.rollout.collector import Collector, RewardScorer
from nemo_aapo.rollout.pipeline import RolloutSource
from nemo_aapo.run import summary as report
from nemo_aapo.run.experiment import open_experiment
from nemo_aapo.run.identity import identity_of
from nemo_aapo.run.progress import Progress
from nemo_aapo.run.reporter import RunReporter
from nemo_aapo.run.stop import StopSignal
from nemo_aapo.training.build_reference import build_reference, open_reference_store
from nemo_aapo.training.trainer import AAPOTrainer
from nemo_aapo.types import SamplingSpec


def train(config: Config, tree: dict[str, Any] | None = None, **parts: Any) -> int:
    """A whole run: join the ranks, build, fit, export. Collective.

    Args:
        config: the typed configuration.
        tree: the same as a resolved plain tree, for ``config.yaml``; made from ``config`` if not given.
        parts: of one's own, as ``build_trainer`` takes them.

    Returns:
        0: complete, or stopped by a signal after a checkpoint.

    Raises:
        ConfigError, DataError: what can't work, on every rank.
    """
    config = precision.decide(config)
    decided = json.loads(json.dumps(dataclasses.asdict(config)))
    tree = decided if tree is None else {**tree, "precision": decided["precision"], "model": decided["model"]}
    world_size = world_size_of_job()
    if config.rollout.engine == "trtllm":
        trtllm_settings.check(config)
    _, sizes = model_dir.check_model(config, world_size)
    initialize(config)
    rank = parallel.rank()
    try:
        with (
            parallel.agree(lambda: open_experiment(config, tree, rank=rank, world_size=world_size)) as experiment,
            StopSignal(Path(config.run.dir), speak=rank == 0) as stop,
            Progress(config.trainer.max_steps, enabled=rank == 0) as progress,
            contextlib.ExitStack() as stack,
        ):
            for line in sizes.arithmetic:
                progress.note(line)
            reporter = RunReporter(experiment, progress, stop, console_samples=config.validation.console_samples)
            with parallel.lost_ranks_reported(lambda: "the start"):
                trainer = build_trainer(config, reporter=reporter, stack=stack, **parts)
            complete = trainer.fit()
            if complete:
                _finish(trainer, reporter)
            else:
                progress.note(f"stopped after step {trainer.step}; the same command goes on from there")
        if complete and rank == 0:
            print(report.summary_table(config), flush=True)
        return 0
    finally:
        parallel.shutdown()


def initialize(config: Config) -> None:
    """Join the job's ranks and cut them into Megatron's groups."""
    cpu.install()
    parallel.initialize(
        tensor_model_parallel_size=config.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.model.pipeline_model_parallel_size,
        seed=config.seed,
        timeout_s=config.trainer.distributed_timeout_s,
    )


def build_trainer(
    config: Config,
    *,
    reporter: Any,
    stack: contextlib.ExitStack,
    data: PromptSet | None = None,
    validation_data: PromptSet | None = None,
    rewards: RewardScorer | None = None,
    engine: Callable[[Any], RolloutEngine] | None = None,
    new_store_key: bool = False,
) -> AAPOTrainer:
    """A trainer of parts by the configuration, but for those that are given. Collective.

    Args:
        reporter: where the loop reports to (``reporter.RunReporter``).
        stack: closes what needs closing (reward workers, the reference store, the engine).
        data, validation_data: prompts; by default those of ``data.train`` and ``data.validation``.
        rewards: a scorer; by default a ``RewardRunner`` for ``rewards`` of the configuration.
        engine: makes an engine of a policy; by default the one that ``rollout.engine`` names.
        new_store_key: take a named reference store even if it holds nothing but other runs' rewards.
    """
    from nemo_aapo.mcore.offload import LearnerOffload

    shape = model_dir.read_model_dir(config.model.path)
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    eos = require_eos(tokenizer, config.model.path)
    scorer = build_scorer(config, rewards, stack)
    if data is None or validation_data is None:
        data, validation_data = read_data(config, tokenizer, scorer, data, validation_data)
    for name, prompts in (("training", data), ("validation", validation_data)):
        reporter.note(f"{_count(prompts)} {name} prompts from {prompts.path}{_left_out(config, prompts)}")
    sampler = build_sampler(config, data)
    sampling = sampling_of(config, eos)
    key, store = open_reference_store(config, sampling, scorer, reporter, stack, new_store_key)
    reporter.note(f"loading {config.model.path} ({shape.architecture}) into Megatron")
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    policy, learner = build_policy_and_learner(config, shape, algorithm)
    decode = text_decoder(tokenizer)
    rollout_engine = engine(policy) if engine else build_engine(config, policy, shape, decode)
    stack.callback(rollout_engine.close)
    collector = Collector(rollout_engine, scorer, decode)
    if config.rollout.offload_learner:
        collector.room = LearnerOffload(policy.model, policy.optimizer, reporter.note)
    return AAPOTrainer(
        config=config,
        policy=policy,
        rollouts=RolloutSource(
            config=config,
            policy=policy,
            collector=collector,
            sampling=sampling,
            prompts=data.prompts,
            sampler=sampler,
            reference=build_reference(config, collector, sampling, key, store),
        ),
        algorithm=algorithm,
        learner=learner,
        validator=_validator(config, collector, validation_data, eos),
        checkpoints=_checkpointer(config),
        reporter=reporter,
    )


# ---------------------------------------------------------------- parts


def build_policy_and_learner(config: Config, shape: ModelShape, algorithm: Algorithm) -> tuple[Any, Any]:
    """``MegatronPolicy`` with the base model's weights, and the ``Learner`` that updates it."""
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.learner.policy import MegatronPolicy

    policy = MegatronPolicy(config, shape)
    if algorithm.needs_reference_logprobs or config.algorithm.reference is not None:
        policy.keep_reference()
    learner = Learner(
        policy,
        algorithm,
        config.max_tokens_per_microbatch,
        config.algorithm.updates_per_rollout,
        pad_multiple=pad_multiple(policy.config),
        packed=policy.config.model.sequence_packing,
        share_prompts=policy.config.model.share_prompts,
    )
    return policy, learner


def _checkpointer(config: Config) -> Checkpointer:
    return Checkpointer(
        Path(config.run.dir) / "checkpoints",
        digests_of_run(config, identity_of(config)),
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        background=config.checkpoint.async_save,
        timeout_s=config.trainer.distributed_timeout_s,
    )


def build_scorer(config: Config, given: RewardScorer | None, stack: contextlib.ExitStack) -> RewardScorer | None:
    """The rewards on this model-parallel group's source rank; None on its other ranks."""
    if given is not None:
        return given if parallel.is_model_parallel_source() else None

    def make() -> RewardRunner | None:
        rewards = [reward_of(entry) for entry in config.rewards]
        if not parallel.is_model_parallel_source():
            return None
        runner = config.reward_runner
        try:
            made = RewardRunner(rewards, runner.workers, runner.timeout_s, score_on_failure=runner.score_on_failure)
        except ValueError as error:
            raise ConfigError(f"rewards, reward_runner: {error}") from error
        return stack.enter_context(made)

    return parallel.agree(make)


def read_data(
    config: Config,
    tokenizer: Any,
    scorer: RewardScorer | None,
    train: PromptSet | None = None,
    validation: PromptSet | None = None,
) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts. Rank 0 reads and checks; all ranks get the same prompts, or the same error.

    Args:
        train, validation: prompts of one's own in place of those that the configuration names.
    """

    def load() -> tuple[PromptSet, PromptSet]:
        verify = getattr(scorer, "check_answer", None)
        return load_data(config.data, tokenizer, verify, train=train, held_out=validation)

    read, held_out = parallel.on_first_rank(load)
    if train is None:
        read = parallel.agree(lambda: attach_endless(read, config.data, tokenizer))
    return read, held_out


def _count(prompts: PromptSet) -> str:
    endless = sum(size is None for size, _ in prompts.shares)
    finite = [str(len(prompts.prompts))] if len(prompts.prompts) else []
    return " + ".join([*finite, *["endless"] * endless])


def _left_out(config: Config, prompts: PromptSet) -> str:
    counts = {
        "bad lines": prompts.bad_lines,
        "over the length limit": prompts.dropped_long,
        "duplicates": prompts.duplicates,
        "among the held-out ones": prompts.contaminated if config.data.on_contamination == "drop" else 0,
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f" (left out: {named})" if named else ""


def sampling_of(config: Config, eos: int) -> SamplingSpec:
    """How policy and reference are sampled in training."""
    return _sampling(config, eos, config.rollout.temperature)


def _sampling(config: Config, eos: int, temperature: float, **more: Any) -> SamplingSpec:
    rollout = config.rollout
    return SamplingSpec(temperature, rollout.max_new_tokens, (eos,), stop_strings=rollout.stop_strings, **more)


def _validator(config: Config, collector: Collector, data: PromptSet, eos: int) -> Validator:
    validation, at_least = config.validation, config.validation.min_new_tokens
    return Validator(
        collector=collector,
        prompts=data.prompts[: validation.max_prompts],
        reward=validation.reward,
        greedy=_sampling(config, eos, 0.0, min_new_tokens=at_least),
        sampled=_sampling(config, eos, validation.temperature, min_new_tokens=at_least, top_p=validation.top_p),
        samples=validation.samples,
        seed=config.seed,
    )


def _finish(trainer: AAPOTrainer, reporter: RunReporter) -> None:
    """Export the model, then mark the run as finished."""
    config = trainer.config
    if config.export_hf_model:
        reporter.note("exporting the Hugging Face model")
        with parallel.lost_ranks_reported(lambda: "the export"):
            trainer.policy.export(str(Path(config.run.dir) / "hf_model"))
    reporter.experiment.finish({"step": trainer.step, "policy_version": trainer.policy.version})
