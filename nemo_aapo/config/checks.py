"""What a configuration can be refused for by itself, before model and ranks are known."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

from nemo_aapo.config.build import check_limits, check_name
from nemo_aapo.config.cluster import check_cluster
from nemo_aapo.config.precision import check_optimizer, check_precision
from nemo_aapo.config.schema import Config
from nemo_aapo.config.schema.limits import COMPLETIONS_OF_STEP
from nemo_aapo.config.sources import check_data
from nemo_aapo.config.staleness import check_staleness
from nemo_aapo.errors import ConfigError


def check_alone(config: Config) -> None:
    """Refuse values and combinations that can't work whatever the model.

    Raises:
        ConfigError: names the key, its value and the reason.
    """
    check_limits(config)
    check_name(config.run.name, config.run.dir)
    if len(config.model.optim.betas) != 2:
        raise ConfigError(f"model.optim.betas={list(config.model.optim.betas)}: two numbers are needed")
    completions = config.prompts_per_step * config.group_size
    if completions > COMPLETIONS_OF_STEP:
        raise ConfigError(
            f"prompts_per_step={config.prompts_per_step} x group_size={config.group_size} = {completions:,} "
            f"completions in one step: at most {COMPLETIONS_OF_STEP:,}"
        )
    if config.model.optim.sched.min_lr > config.model.optim.lr:
        raise ConfigError(
            f"model.optim.sched.min_lr={config.model.optim.sched.min_lr}: the learning rate falls from "
            f"model.optim.lr={config.model.optim.lr} to it, so it can't be higher"
        )
    _check_sampling(config)
    hosted = config.rollout.engine == "remote" and config.rollout.server.engine == "trtllm"
    if hosted or config.rollout.engine == "trtllm":
        _check_trtllm(config)
    if config.rollout.engine == "trtllm":
        _check_trtllm_colocated(config)
    _check_algorithm(config)
    check_staleness(config)
    _check_refit(config)
    remote = config.rollout.remote
    if remote.min_servers > remote.servers:
        raise ConfigError(
            f"rollout.remote.min_servers={remote.min_servers}: the start waits for no more than rollout.remote.servers="
            f"{remote.servers}"
        )
    _check_trace(config)
    _check_keep_best(config)
    _check_lora(config)
    _check_rewards(config)
    check_data(config)
    check_date("data.date", config.data.date)
    check_cluster(config)
    check_precision(config)
    check_optimizer(config.model)
    _check_layout(config)
    if config.model.sequence_parallel and config.model.tensor_model_parallel_size == 1:
        raise ConfigError("model.sequence_parallel=true has no effect without model.tensor_model_parallel_size > 1")
    if config.model.optim.sched.name == "constant" and config.model.optim.sched.min_lr:
        raise ConfigError("model.optim.sched.min_lr has no effect with model.optim.sched.name=constant: set it to 0")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for key in ("max_tokens_per_microbatch", "rollout.max_concurrent_tokens"):
        if _get(config, key) < longest:
            raise ConfigError(
                f"{key}={_get(config, key)} can't hold one sequence: data.max_prompt_tokens="
                f"{config.data.max_prompt_tokens} + rollout.max_new_tokens={config.rollout.max_new_tokens} = {longest}"
            )


MOST_TRACED = 100
"""Steps of a run that may be traced; a trace takes some MB."""


def _check_trace(config: Config) -> None:
    steps, last = config.trace.steps, config.trainer.max_steps
    if later := [step for step in steps if step > last]:
        raise ConfigError(f"trace.steps names step {later[0]}, and the run ends at trainer.max_steps={last}")
    if len(steps) > MOST_TRACED:
        raise ConfigError(f"trace.steps names {len(steps)} steps: up to {MOST_TRACED} of a run can be traced")


def _check_keep_best(config: Config) -> None:
    best = config.checkpoint.keep_best
    if best in ("validation/accuracy_greedy", "validation/accuracy_sampled") and not config.trainer.val_check_interval:
        raise ConfigError(
            f"checkpoint.keep_best={best}: trainer.val_check_interval=0 never validates. Set it to 1 or more, or keep "
            "the best by reward/mean"
        )
    if best == "validation/accuracy_sampled" and not config.validation.samples:
        raise ConfigError(
            f"checkpoint.keep_best={best}: validation.samples=0 measures the greedy accuracy alone. Set it to 1 or "
            "more, or keep the best by validation/accuracy_greedy"
        )


def _check_layout(config: Config) -> None:
    """What megatron-core could do and is not wired here, and settings without effect."""
    model = config.model
    if model.context_parallel_size > 1 and model.sequence_packing is False:
        raise ConfigError(
            f"model.context_parallel_size={model.context_parallel_size} cuts rows of sequences end to end, and "
            "model.sequence_packing=false pads each sequence to a row: set it to true, or leave it at null"
        )
    if model.recompute_granularity == "selective" and not model.recompute_modules:
        raise ConfigError("model.recompute_granularity=selective recomputes model.recompute_modules, which is empty")
    if config.rollout.offload_learner and config.rollout.engine == "remote" and config.rollout.refit != "ipc":
        raise ConfigError(
            "rollout.offload_learner=true has no effect with rollout.engine=remote, which generates elsewhere (but "
            "with rollout.refit=ipc)"
        )
    engine = config.rollout.server.engine if config.rollout.engine == "remote" else config.rollout.engine
    if config.rollout.speculation is not None and engine != "megatron":
        raise ConfigError(f"rollout.speculation has no effect with the engine {engine}: leave it at null")
    if config.rollout.offload_learner and model.optim.cpu_offload_fraction:
        raise ConfigError(
            f"rollout.offload_learner=true with model.optim.cpu_offload_fraction={model.optim.cpu_offload_fraction}: "
            "the optimizer state would move while a part of it lives in host memory. Use one of the two"
        )


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of the layers that can have an adapter: attention in and out, feed-forward in and out."""


def _check_lora(config: Config) -> None:
    lora, tp = config.model.lora, config.model.tensor_model_parallel_size
    if lora is None:
        return
    if lora.rank % tp:
        raise ConfigError(
            f"model.lora.rank={lora.rank} is not divisible by model.tensor_model_parallel_size={tp}: adapters are cut "
            "over the tensor-parallel ranks"
        )
    if (
        config.precision.name.startswith("fp8")
        or config.rollout.offload_learner
        or config.model.optim.cpu_offload_fraction
    ):
        raise ConfigError(
            f"model.lora with precision={config.precision.name}, rollout.offload_learner="
            f"{str(config.rollout.offload_learner).lower()}, model.optim.cpu_offload_fraction="
            f"{config.model.optim.cpu_offload_fraction}: adapters were never trained so. Use bf16 or fp32, false and 0"
        )
    unknown = [name for name in lora.target_modules if name not in LORA_TARGETS]
    if unknown or not lora.target_modules:
        raise ConfigError(
            f"model.lora.target_modules={list(lora.target_modules)}: some of {', '.join(LORA_TARGETS)} are needed"
        )


def check_date(key: str, date: str | None) -> None:
    """Raise ConfigError unless it is a day as ``YYYY-MM-DD``, or none."""
    try:
        if date is not None and len(date) != len("YYYY-MM-DD"):
            raise ValueError
        datetime.date.fromisoformat(date or "2000-01-01")
    except ValueError:
        raise ConfigError(f"{key}={date}: a day is needed, as 2025-01-31, or null") from None


def _check_sampling(config: Config) -> None:
    rollout = config.rollout
    if rollout.top_p != 1 or rollout.top_k != 0:
        raise ConfigError(
            f"rollout.top_p={rollout.top_p}, rollout.top_k={rollout.top_k}: truncated sampling has another "
            "distribution than the loss trains. Keep top_p=1 and top_k=0 (validation.top_p is free)"
        )
    _check_replay(config)
    if rollout.keep_tokens and rollout.keep_groups == 0:
        raise ConfigError("rollout.keep_tokens=true has no effect with rollout.keep_groups=0, which keeps no rollouts")
    if "" in rollout.stop_strings:
        raise ConfigError("rollout.stop_strings holds an empty string, which would end every completion at once")
    if config.validation.min_new_tokens > rollout.max_new_tokens:
        raise ConfigError(
            f"validation.min_new_tokens={config.validation.min_new_tokens} is more than "
            f"rollout.max_new_tokens={rollout.max_new_tokens}: no completion could end by itself"
        )


def _check_replay(config: Config) -> None:
    """What a replayed run, which has no engine, can't do."""
    replay, directory = config.rollout.replay, config.run.dir
    if replay is None:
        return
    if config.trainer.val_check_interval:
        raise ConfigError(
            f"rollout.replay={replay} has no engine that could be validated: set trainer.val_check_interval=0"
        )
    if config.rollout.async_depth or config.data.sampling != "uniform":
        raise ConfigError("rollout.replay has no effect with rollout.async_depth or data.sampling other than uniform")
    if config.rollout.oversample is not None:
        raise ConfigError("rollout.replay has no effect with rollout.oversample: what was left out was not kept")
    if Path(replay).absolute() == Path(directory).absolute():
        raise ConfigError(f"rollout.replay={replay}: is this run itself. Give this one another name (run.name=NAME)")


def _check_trtllm(config: Config) -> None:
    """An engine of TensorRT-LLM, wherever it runs."""
    if config.rollout.stop_strings or config.validation.min_new_tokens:
        raise ConfigError(
            f"rollout.stop_strings={list(config.rollout.stop_strings)}, validation.min_new_tokens="
            f"{config.validation.min_new_tokens}: rollout.engine=trtllm has neither, since it runs without a tokenizer "
            "and holds back its own end token only. Use rollout.engine=megatron, or [] and 0"
        )


def _check_trtllm_colocated(config: Config) -> None:
    """The same in the learner's GPUs."""
    model, trtllm = config.model, config.rollout.trtllm
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if trtllm.tensor_parallel_size not in (None, tp * pp):
        raise ConfigError(
            f"rollout.trtllm.tensor_parallel_size={trtllm.tensor_parallel_size}: in the learner's GPUs an engine takes "
            f"those of a model-parallel group, tensor {tp} x pipeline {pp} = {tp * pp}; leave it null"
        )
    # Neighbouring ranks are tensor-parallel; pipeline stages are the farthest apart, hence on several nodes.
    if config.trainer.devices % tp or (pp > 1 and config.trainer.num_nodes > 1):
        raise ConfigError(
            f"tensor {tp} x pipeline {pp} on {config.trainer.num_nodes} x {config.trainer.devices} ranks puts a "
            "model-parallel group on several nodes, but an engine of rollout.engine=trtllm needs its GPUs on one"
        )


def _check_algorithm(config: Config) -> None:
    algorithm = config.algorithm
    if algorithm.custom is None:
        _check_switches(config)
    least = algorithm.min_group_size
    if least is not None and least > config.group_size:
        raise ConfigError(f"algorithm.min_group_size={least}: no group has more than group_size={config.group_size}")
    if algorithm.reference is None:
        return _refuse_without_effect(config, "reference_samples", "reference_store", "reference_fill_steps")
    samples = algorithm.reference_samples
    if samples is None or samples < config.group_size:
        raise ConfigError(f"algorithm.reference_samples={samples}: at least group_size={config.group_size} needed")
    if algorithm.reference == "online" and samples != config.group_size:
        raise ConfigError(
            f"algorithm.reference_samples={samples}: online reference rewards are sampled group_size="
            f"{config.group_size} at a time"
        )
    if algorithm.reference == "cached" and algorithm.reference_store is None:
        raise ConfigError("algorithm.reference_store must name a file for algorithm.reference=cached")
    if algorithm.reference == "online":
        _refuse_without_effect(config, "reference_store", "reference_fill_steps")


def _check_switches(config: Config) -> None:
    """Switches of the built-in algorithms that can't go together."""
    algorithm = config.algorithm
    if algorithm.settings or algorithm.needs:
        raise ConfigError(
            "algorithm.settings and algorithm.needs are those of a class of your own, and have no effect with "
            "algorithm.custom=null: set them to null"
        )
    if (algorithm.margin is None) != (algorithm.reference is None):
        raise ConfigError(
            "algorithm.margin and algorithm.reference go together: the margin needs reference rewards, and they have "
            "no other use. Set both or set both to null (algorithm=aapo, algorithm=gpg)"
        )
    margin = algorithm.margin
    if margin is not None and not (margin.low <= 0 <= margin.high and margin.low < margin.high):
        raise ConfigError(
            f"algorithm.margin: low={margin.low}, high={margin.high}: low <= 0 <= high with low < high is needed"
        )
    if (algorithm.loss == "cross_entropy") != (algorithm.clip is None):
        raise ConfigError(
            f"algorithm.clip is what a loss with a ratio (algorithm.loss=ratio_clip and the like) needs and nothing "
            f"else uses: with algorithm.loss={algorithm.loss} {'set it to null' if algorithm.clip else 'set it'}"
        )
    if algorithm.margin_schedule is not None and algorithm.margin is None:
        raise ConfigError("algorithm.margin_schedule has no effect with algorithm.margin=null: set it to null")
    if algorithm.scale_margin and algorithm.margin is None:
        raise ConfigError("algorithm.scale_margin=true has no effect with algorithm.margin=null: set it to false")
    if algorithm.dual_clip is not None and algorithm.loss not in ("ratio_clip", "sequence_ratio_clip"):
        raise ConfigError(f"algorithm.dual_clip has no effect with algorithm.loss={algorithm.loss}: set it to null")
    if algorithm.kl_coefficient and algorithm.loss == "cross_entropy":
        raise ConfigError("algorithm.kl_coefficient has no effect with algorithm.loss=cross_entropy: set it to 0")


def _check_refit(config: Config) -> None:
    depth, nodes = config.rollout.async_depth, config.trainer.num_nodes
    if config.rollout.refit == "ipc" and (depth or nodes > 1):
        raise ConfigError(
            f"rollout.refit=ipc with rollout.async_depth={depth}, trainer.num_nodes={nodes}: servers read weights in "
            "the trainer's memory, on one machine, while it waits. Set these to 0 and 1, or use another refit"
        )
    if config.rollout.refit != "collective":
        return
    if config.rollout.server.engine != "megatron":
        raise ConfigError(
            "rollout.refit=collective sends Megatron's own weights, and rollout.server.engine=trtllm has others: use "
            "rollout.refit=files or delta"
        )


def _refuse_without_effect(config: Config, *names: str) -> None:
    """These settings of ``algorithm`` do nothing under its ``reference``."""
    for name in names:
        if getattr(config.algorithm, name) is not None:
            mode = "null" if config.algorithm.reference is None else config.algorithm.reference
            raise ConfigError(f"algorithm.{name} has no effect with algorithm.reference={mode}: set it to null")


def _check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError("rewards is empty: name at least one, as in rewards=[{name: accuracy, weight: 1.0}]")
    for i, entry in enumerate(config.rewards):
        if not isinstance(entry, dict) or not entry.get("name"):
            raise ConfigError(f"rewards[{i}]={entry!r}: an entry needs a name, as in {{name: accuracy, weight: 1.0}}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"rewards[{i}].weight={weight!r}: a number is needed")
        limit = entry.get("timeout_s", 0.0)
        if isinstance(limit, int | float) and limit >= config.reward_runner.timeout_s:
            raise ConfigError(
                f"rewards[{i}].timeout_s={limit}: reward_runner.timeout_s={config.reward_runner.timeout_s} would kill "
                "the worker before; make that longer"
            )
    names = [_reward_name(entry) for entry in config.rewards]
    if len(set(names)) != len(names):
        raise ConfigError(f"rewards: {names} names one reward twice")


def _reward_name(entry: dict[str, Any]) -> str:
    """The name of a reward's values in metrics: of a custom one its function's."""
    return str(entry["function"]).rpartition(":")[2] if "function" in entry else str(entry["name"])


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value
