"""What a plan is asked: a configuration, which need not be complete, and a few words of the plan's own. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_aapo.config import Config, check_overrides, kind_of, parse, with_machine_defaults
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import hardware, models
from nemo_aapo.planning.inputs import Question
from nemo_aapo.planning.models import PlannedModel
from nemo_aapo.planning.simulation.lengths import Lengths, LogNormal, kept_lengths
from nemo_aapo.prepare.job import rewards_of

OWN_WORDS = {
    "model": "a model known by name; or model.path=DIR, of which only config.json is read",
    "hardware": f"{' | '.join(hardware.KNOWN)}",
    "mean_prompt_tokens": "mean length of prompts; by default data.max_prompt_tokens",
    "mean_completion_tokens": "mean length of completions; by default rollout.max_new_tokens",
    "dataset_prompts": "prompts in the training data; by default no prompt is taken twice",
    "tail_factor": "simulates rollouts: the longest completion of a step over the mean (rollout/tail_factor)",
    "lengths": "or simulates them with the lengths of the completions that this run directory kept",
    "gpus": "GPUs that the simulation divides between trainer and rollout servers; by default the trainer's",
}
"""Words that are no settings of a run."""
DEFAULT_HARDWARE = "h100"
NOT_NEEDED = "(not needed for a plan)"
MISSING = "???"


def prepare_plan(words: Sequence[str]) -> tuple[Config, Question]:
    """The configuration and the question of ``KEY=VALUE`` words, for ``planning.plan.make``.

    Raises:
        ConfigError: what a run would be refused for (but for missing files and names), an unknown model or GPU, a
            length that the configuration rules out.
    """
    own, others = split(words)
    command = read_command_line(others)
    own_groups: dict[str, list[str]] = {word: [] for word in OWN_WORDS}  # so that a mistyped one is recognised
    check_overrides(command.overrides, {**command.groups(), **own_groups})
    tree = compose(command)
    path_is_missing = tree["model"]["path"] == MISSING
    for section, key in (("model", "path"), ("data", "train"), ("data", "validation")):
        if tree[section][key] == MISSING:
            tree[section][key] = NOT_NEEDED
    config = with_machine_defaults(parse(tree), on_gpu=True)
    if config.rollout.engine == "plain":
        raise ConfigError(
            "rollout.engine=plain: a plan knows engines that keep keys and values only. Ask it with "
            "rollout.engine=megatron: what it says of memory and training holds, rollouts take many times as long"
        )
    if config.rollout.engine == "remote" and config.rollout.refit == "ipc" and config.rollout.server.engine != "trtllm":
        raise ConfigError(
            "rollout.refit=ipc: of servers on the learner's GPUs a plan knows those of TensorRT-LLM only. Ask it with "
            "rollout.server.engine=trtllm; Megatron's keep a copy of the weights there besides"
        )
    is_typed = any(word.startswith("model.path=") for word in command.overrides)
    model = _model(own, MISSING if path_is_missing else config.model.path, is_typed)
    rewards_of(config)
    gpu = hardware.find(own.get("hardware", DEFAULT_HARDWARE))
    newer = kind_of(config).below_capability
    if newer and gpu.capability >= newer:
        raise ConfigError(f"precision={config.precision.name} is for Hopper, not for {gpu.name}: use fp8_tensorwise")
    longest_prompt, longest_completion = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    mean = _length(own, "mean_completion_tokens", longest_completion, "rollout.max_new_tokens")
    return config, Question(
        model=model,
        hardware=gpu,
        mean_prompt_tokens=_length(own, "mean_prompt_tokens", longest_prompt, "data.max_prompt_tokens"),
        mean_completion_tokens=mean,
        dataset_prompts=_count(own, "dataset_prompts"),
        lengths=_lengths(own, config, mean),
        gpus=_count(own, "gpus"),
    )


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own words, and all others."""
    pairs = [(word, word.partition("=")) for word in words]
    own = {key: value for _, (key, equals, value) in pairs if equals and key in OWN_WORDS}
    return own, [word for word, (key, equals, _) in pairs if not (equals and key in OWN_WORDS)]


def _model(own: dict[str, str], path: str, is_typed: bool) -> PlannedModel:
    """The model named, in place of one that an experiment's page names by its path; or the one at the path."""
    if "model" in own:
        if is_typed:
            raise ConfigError(f"model={own['model']} and model.path={path} name two models: leave one out")
        return models.find(own["model"])
    if path == MISSING:
        raise ConfigError(f"which model? model=NAME, of {', '.join(models.KNOWN)}; or model.path=DIR")
    try:
        return models.read(path)
    except ConfigError as error:
        if (known := models.known_as(path)) is None or (Path(path) / "config.json").exists():
            raise
        raise ConfigError(f"{error}; without the directory: model={known}") from None


def _length(own: dict[str, str], word: str, limit: int, key: str) -> float:
    value = _number(word, own[word]) if word in own else float(limit)
    if value > limit:
        raise ConfigError(f"{word}={own[word]}: more than {key}={limit}")
    return value


def _lengths(own: dict[str, str], config: Config, mean: float) -> Lengths | None:
    """The distribution that a simulation is asked for with."""
    if "lengths" in own:
        if both := [word for word in ("mean_completion_tokens", "tail_factor") if word in own]:
            raise ConfigError(f"lengths={own['lengths']} has the lengths already: leave {' and '.join(both)} out")
        return kept_lengths(Path(own["lengths"]))
    if "tail_factor" not in own:
        if "gpus" in own:
            raise ConfigError("gpus= is for a simulation: tail_factor= or lengths= asks for one")
        return None
    completions, limit = config.prompts_per_step * config.group_size, config.rollout.max_new_tokens
    return LogNormal(mean, _number("tail_factor", own["tail_factor"]), completions, limit)


def _count(own: dict[str, str], word: str) -> int | None:
    if word not in own:
        return None
    value = _number(word, own[word])
    if value != int(value):
        raise ConfigError(f"{word}={own[word]}: a whole number is needed")
    return int(value)


def _number(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise ConfigError(f"{word}={text}: a number from 1 on is needed")
    return value
