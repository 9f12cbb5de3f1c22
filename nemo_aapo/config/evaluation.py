"""What an evaluation can be refused for by itself, before model and ranks are known."""

from __future__ import annotations

from nemo_aapo.config.build import check_limits, check_name
from nemo_aapo.config.checks import check_date
from nemo_aapo.config.schema import EvaluationConfig
from nemo_aapo.errors import ConfigError


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuse values and combinations that can't work whatever the model.

    Raises:
        ConfigError: names the key, its value and the reason.
    """
    check_limits(config)
    check_name(config.run.name, config.run.dir)
    check_date("date", config.date)
    sampling = config.sampling
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
