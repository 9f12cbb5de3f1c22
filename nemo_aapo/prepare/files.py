"""What the files that a configuration names tell before they are read: data, a run to replay. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from nemo_aapo.config.schema import Config, Data
from nemo_aapo.config.sources import Source, sources_of
from nemo_aapo.data.records import check_source
from nemo_aapo.errors import ConfigError, DataError
from nemo_aapo.run.names import ROLLOUTS, kept_name


def check_data(data: Data, given: Collection[str] = ()) -> None:
    """Refuse sources that are not there. Tasks of reasoning-gym and names on the hub are asked for later.

    Args:
        given: parts that the caller brings.

    Raises:
        DataError: the setting, the path, and what there is instead.
    """
    for key, source in named_sources(data, given):
        if source.task is None:
            try:
                check_source(source)
            except DataError as error:
                raise DataError(f"{key}: {error}") from None


def check_replay(config: Config) -> None:
    """Refuse a run to replay that has kept nothing.

    Raises:
        ConfigError: the setting, and what is needed.
    """
    replay = config.rollout.replay
    if replay is not None and not (Path(replay) / ROLLOUTS / f"{kept_name(1)}.safetensors").is_file():
        raise ConfigError(
            f"rollout.replay={replay}: no rollouts with their tokens are there. Name the directory of a run that was "
            "made with rollout.keep_groups=all rollout.keep_tokens=true"
        )


def named_sources(data: Data, given: Collection[str]) -> Iterator[tuple[str, Source]]:
    """The sources of training and held-out prompts, each with its setting, but for the parts that a caller brings."""
    if "data" not in given:
        yield from (("data.train", source) for source in sources_of(data, "train"))
    if "validation_data" not in given:
        yield from (("data.validation", source) for source in sources_of(data, "validation"))
