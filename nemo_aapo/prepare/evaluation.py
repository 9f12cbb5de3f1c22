"""What an evaluation is to measure, wholly resolved. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.config import Config, EvaluationConfig, ModelShape, without_secrets
from nemo_aapo.config.build import with_paths
from nemo_aapo.config.command_line import EVALUATION
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema import EvaluationRollout
from nemo_aapo.conversion.source import ModelSource
from nemo_aapo.data.records import check_source
from nemo_aapo.errors import DataError
from nemo_aapo.evaluation.benchmarks import source_of
from nemo_aapo.evaluation.prompts import check_template
from nemo_aapo.evaluation.settings import check_model, engine_settings, find_model
from nemo_aapo.launch.world import decide, of_launcher, of_starter
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.prepare.job import Words, command_line
from nemo_aapo.prepare.packages import MEGATRON, SERVERS, check_packages, rewards_need, source_needs
from nemo_aapo.prepare.text import with_evaluation_date
from nemo_aapo.rewards import reward_of
from nemo_aapo.rewards.base import Reward
from nemo_aapo.utils.files import require_directory


@dataclass(frozen=True)
class EvaluationJob:
    """A model, benchmarks, and how completions are drawn and judged."""

    config: EvaluationConfig
    tree: Mapping[str, Any]
    """The configuration as a plain tree: what ``config.yaml`` of the evaluation's directory shows."""
    source: ModelSource
    """Where the weights come from."""
    settings: Config
    """The parts that evaluation shares with training (ranks, layout, precision, rewards, engine), decided where the
    machine is known; with the launcher's ``cluster``, if it has one."""
    shape: ModelShape
    """The shape of the model that is measured."""
    reward: Reward
    """What tells right from wrong."""


def prepare_evaluation(words: Words, launched: Sequence[str] | None = None) -> EvaluationJob:
    """The evaluation that words ask for, with every refusal that words and files allow.

    Args:
        launched: the words on ``cluster`` and ``dry_run``, where ``launch.py`` starts it; None: it starts here.

    Raises:
        ConfigError, DataError: what can't work, with the reason and the remedy. Nothing was written.
    """
    tree = compose(command_line(words, EVALUATION))
    return resolve_evaluation(EVALUATION.parse(tree), without_secrets(tree), launched)


def resolve_evaluation(
    config: EvaluationConfig, tree: Mapping[str, Any], launched: Sequence[str] | None = None
) -> EvaluationJob:
    """The same of a configuration that was composed elsewhere; ``tree`` shows it."""
    check_template(config.prompt_template)
    reward, _ = reward_of(config.rewards[0])
    source = find_model(config)
    settings = engine_settings(config, source, launched or ())
    world = of_starter(config) if launched is None else of_launcher(settings)
    check_model(config, source, world.size)
    shape = read_model_dir(str(source.base))
    config = with_evaluation_date(config, source, shape.vocab_size)
    config = replace(config, rollout=EvaluationRollout(_engine(settings), settings.rollout.remote))
    _check_benchmarks(config)
    require_directory(Path(config.run.dir), f"run.dir={config.run.dir}")
    if world.machine is not None:  # else each rank prepares it again, where it runs
        settings = decide(settings, world.machine)
        servers = [SERVERS] if config.rollout.engine == "remote" else []
        check_packages([*MEGATRON, *servers, *rewards_need(config.rewards)])
    tree = {**with_paths(tree, config), "date": config.date, "rollout": asdict(config.rollout)}
    return EvaluationJob(config, tree, source, settings, shape, reward)


def _engine(settings: Config) -> Literal["megatron", "plain", "remote"]:
    """Where it samples; servers that a launcher starts beside it are reason enough."""
    engine = settings.rollout.engine
    assert engine != "trtllm"
    return engine


def _check_benchmarks(config: EvaluationConfig) -> None:
    for name in config.benchmarks:
        source = source_of(name, config.sources[name])
        try:
            check_source(source)
        except DataError as error:
            raise DataError(f"sources.{name}: {error}") from None
        check_packages(source_needs(source))
