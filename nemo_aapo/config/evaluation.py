"""The schema of an evaluation: field for field what ``conf/evaluate.yaml`` says (a test holds the two together).

Names that an evaluation shares with training mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nemo_aapo.config.schema import Run
from nemo_aapo.errors import ConfigError


@dataclass(frozen=True)
class EvaluatedModel:
    """What is measured, and its layout over the ranks."""

    path: str
    base: str | None
    trust_remote_code: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int


@dataclass(frozen=True)
class EvaluationRanks:
    """Ranks and deadlines."""

    num_nodes: int
    devices: int
    distributed_timeout_s: float
    fault_timeout_s: float


@dataclass(frozen=True)
class EvaluationFields:
    """Columns of a source of one's own."""

    question: str
    answer: str
    level: str | None
    subject: str | None


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_strings: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationRunner:
    """The processes that judge completions."""

    workers: int
    timeout_s: float


@dataclass(frozen=True)
class EvaluationPrecision:
    """Numbers and kernels: training's names, without FP8, which an engine does not decode in."""

    name: Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class EvaluationConfig:
    """A whole evaluation."""

    run: Run
    seed: int
    model: EvaluatedModel
    benchmarks: tuple[str, ...]
    sources: dict[str, Any]
    fields: EvaluationFields
    prompt_template: str
    system_prompt: str | None
    chat_template: Literal["auto", "none"]
    max_prompt_tokens: int
    max_problems: int | None
    on_bad_answer: Literal["error", "wrong"]
    samples: int
    sampling: Sampling
    rewards: tuple[dict[str, Any], ...]
    reward_runner: EvaluationRunner
    problems_per_batch: int
    max_concurrent_tokens: int
    trainer: EvaluationRanks
    precision: EvaluationPrecision


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuse values and combinations that can't work whatever the model.

    Raises:
        ConfigError: names the key, its value and the reason.
    """
    sampling = config.sampling
    for path, value, minimum in (
        ("samples", config.samples, 1),
        ("problems_per_batch", config.problems_per_batch, 1),
        ("max_problems", config.max_problems, 1),
        ("max_prompt_tokens", config.max_prompt_tokens, 1),
        ("sampling.max_new_tokens", sampling.max_new_tokens, 1),
        ("sampling.temperature", sampling.temperature, 0),
        ("seed", config.seed, 0),
        ("reward_runner.workers", config.reward_runner.workers, 0),
        ("trainer.num_nodes", config.trainer.num_nodes, 1),
        ("trainer.devices", config.trainer.devices, 1),
        ("model.tensor_model_parallel_size", config.model.tensor_model_parallel_size, 1),
        ("model.pipeline_model_parallel_size", config.model.pipeline_model_parallel_size, 1),
    ):
        if value is not None and value < minimum:
            raise ConfigError(f"{path}={value}: must be at least {minimum}")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"sampling.top_p={sampling.top_p}: must lie in (0, 1]")
    if sampling.temperature == 0 and config.samples > 1:
        raise ConfigError(f"samples={config.samples} with sampling.temperature=0: all of a problem would be the same")
    if "" in sampling.stop_strings:
        raise ConfigError("sampling.stop_strings holds an empty string, which would end every completion at once")
    longest = config.max_prompt_tokens + sampling.max_new_tokens
    if config.max_concurrent_tokens < longest:
        raise ConfigError(
            f"max_concurrent_tokens={config.max_concurrent_tokens} can't hold one sequence: max_prompt_tokens="
            f"{config.max_prompt_tokens} + sampling.max_new_tokens={sampling.max_new_tokens} = {longest}"
        )
    if len(config.rewards) != 1 or not config.rewards[0].get("name"):
        raise ConfigError(f"rewards={list(config.rewards)}: one that says right or wrong, as in [{{name: accuracy}}]")
    _check_benchmarks(config)


def _check_benchmarks(config: EvaluationConfig) -> None:
    if not config.benchmarks or len(set(config.benchmarks)) != len(config.benchmarks):
        raise ConfigError(f"benchmarks={list(config.benchmarks)}: at least one, and each only once")
    for name in config.benchmarks:
        if not config.sources.get(name):
            known = ", ".join(config.sources)
            raise ConfigError(f"benchmarks: {name!r} has no source; known are {known}. +sources.{name}=FILE names one")
