"""An evaluation's configuration: checks against model and ranks, and its form for the parts of training. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from nemo_aapo.config import Config, EvaluationConfig, derive, parse
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.cluster import Servers
from nemo_aapo.conversion.source import ModelSource, check_base, find_source
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.rewards import reward_of


def find_model(config: EvaluationConfig) -> ModelSource:
    """What ``model.path`` names: a Hugging Face directory, a run or a checkpoint. Looks at names of files only.

    Raises:
        ConfigError: none of these, or a run whose base model can't be found.
    """
    return find_source(config.model.path, config.model.base, base_option="model.base=")


def reward_name(config: EvaluationConfig) -> str:
    """The name of the reward's values; a custom reward's is that of its function.

    Raises:
        ConfigError: an unknown reward or parameter.
    """
    return reward_of(config.rewards[0])[0].name


def engine_settings(config: EvaluationConfig, source: ModelSource, launched: Sequence[str] = ()) -> Config:
    """A configuration of training for the parts that evaluation shares with it: layout, precision, rewards, engine.

    Args:
        launched: ``cluster`` and ``dry_run`` of the launcher that starts it; with servers beside it, it samples there.

    Raises:
        ConfigError: a setting that training refuses.
    """
    tree = compose(read_command_line(["algorithm=gpg", *launched]))
    tree["run"].update(asdict(config.run))
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    tree["seed"] = config.seed
    tree["precision"]["name"] = config.precision.name
    tree["trainer"].update(asdict(config.trainer))
    layout = [f"{key}_model_parallel_size" for key in ("tensor", "pipeline", "expert")]
    tensor = config.model.tensor_model_parallel_size
    tree["model"].update(
        path=str(source.base),
        trust_remote_code=config.model.trust_remote_code,
        sequence_parallel=tensor > 1,  # training with experts needs it, and nothing is trained
        **{key: getattr(config.model, key) for key in layout},
    )
    tree["data"].update(train="none", validation="none", max_prompt_tokens=config.max_prompt_tokens)
    beside = Servers(**tree["cluster"]["servers"]).count
    tree["rollout"].update(
        engine="remote" if beside else config.rollout.engine,
        max_new_tokens=config.sampling.max_new_tokens,
        max_concurrent_tokens=config.max_concurrent_tokens,
        remote=asdict(config.rollout.remote) | ({"servers": beside} if beside else {}),
    )
    tree["rollout"]["server"]["directory"] = config.rollout.remote.directory
    tree["max_tokens_per_microbatch"] = longest + tensor  # padded to a multiple of it
    # A multiple of the data-parallel size, whatever that is.
    tree["prompts_per_step"] = config.trainer.num_nodes * config.trainer.devices
    tree["rewards"] = list(config.rewards)
    tree["validation"]["reward"] = reward_name(config)
    tree["reward_runner"].update(asdict(config.reward_runner))
    return parse(tree)


def check_model(config: EvaluationConfig, source: ModelSource, world_size: int) -> None:
    """The model against the configuration and the number of ranks. Reads small files; no torch.

    Raises:
        ConfigError: a model that is incomplete or not supported, a layout that does not divide it, more tokens than it
            has positions.
    """
    shape = read_model_dir(str(source.base))
    check_base(source)
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > shape.max_position_embeddings:
        raise ConfigError(
            f"max_prompt_tokens={config.max_prompt_tokens} + "
            f"sampling.max_new_tokens={config.sampling.max_new_tokens} = {longest} exceeds the "
            f"{shape.max_position_embeddings} positions of the model (max_position_embeddings): lower them"
        )
    derive(engine_settings(config, source), shape, world_size)
