"""What kind of model a path holds, and where its base model and its run are. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.config import build
from nemo_aapo.config.schema import Lora
from nemo_aapo.errors import ConfigError
from nemo_aapo.run.directory import read_record
from nemo_aapo.run.identity import model_identity
from nemo_aapo.run.names import CHECKPOINTS, step_of
from nemo_aapo.utils.safetensors import has_weights
from nemo_aapo.utils.unforeseen import paths_refused

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # where libyaml is there, ten times faster
Kind = Literal["hf", "megatron", "checkpoint", "run"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on the disk, and where the rest of what is known of it lies.

    Example: ``find_source("results/math7b")`` is ``ModelSource("run", Path("results/math7b"),
    Path("/models/Qwen2.5-7B"), Path("results/math7b"))``.
    """

    kind: Kind
    """``hf``: a Hugging Face directory. ``megatron``: what ``hf-to-megatron`` wrote. ``checkpoint``: one of a run.
    ``run``: the newest whole checkpoint of a run."""
    path: Path
    named_base: Path | None
    """The Hugging Face directory with architecture and tokenizer: the model itself, or what a run started from. None
    where no configuration names it; it may have been removed since."""
    run: Path | None = None
    """The directory of the run that the model comes from, if it does."""
    base_option: str = "--base "
    """What a user writes before a base model's path, for messages."""

    @property
    def base(self) -> Path:
        """``named_base``, which is there.

        Raises:
            ConfigError: it is unknown or not there; the message says how to name it.
        """
        if self.named_base is None:
            raise ConfigError(
                f"{self.path}: no config.yaml of a run says what its base model was; name it by {self.base_option}DIR"
            )
        if not (self.named_base / "config.json").exists():
            raise ConfigError(
                f"{self.path}: its base model {self.named_base} is not there (no config.json); "
                f"name it by {self.base_option}DIR"
            )
        return self.named_base

    def candidates(self) -> list[Path]:
        """The Megatron checkpoints to try, the newest first; looked up at each call, as a trainer removes old ones.

        Raises:
            ConfigError: a run without a checkpoint.
        """
        if self.kind != "run":
            return [self.path]
        found = _checkpoints(self.path)
        if not found:
            raise ConfigError(f"{self.path / CHECKPOINTS} holds no checkpoint (step_NNNNNN): none was saved yet")
        return found[::-1]


@paths_refused()
def find_source(path: Path | str, base: Path | str | None = None, base_option: str = "--base ") -> ModelSource:
    """Find out what a path holds, by the names of the files there.

    Args:
        path: a Hugging Face directory, what ``hf-to-megatron`` wrote, a run directory, or a checkpoint in one.
        base: of a run: its base model, where it is no longer where the run's ``config.yaml`` says.
        base_option: see ``ModelSource``.

    Raises:
        ConfigError: none of these is there.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise ConfigError(f"{path}: {'is a file; name the directory' if path.exists() else 'no such directory'}")
    if path.name == CHECKPOINTS and _checkpoints(path.parent):
        path = path.parent
    if (path / manifest.FILE_NAME).exists() or step_of(path.name) is not None:
        if (path / "config.json").exists():
            return ModelSource("megatron", path, _own_base(path, base, base_option))
        run = path.parent.parent if path.parent.name == CHECKPOINTS else None
        return ModelSource("checkpoint", path, _base_of_run(run, base), run, base_option)
    if (path / "config.json").exists():
        return ModelSource("hf", path, _own_base(path, base, base_option))
    if (path / "config.yaml").exists() or _checkpoints(path):
        return ModelSource("run", path, _base_of_run(path, base), path, base_option)
    raise ConfigError(
        f"{path}: neither a Hugging Face model (config.json), nor a Megatron checkpoint (manifest.json), nor a run "
        "directory (config.yaml, checkpoints/)"
    )


def check_base(source: ModelSource) -> None:
    """Refuse another base model than the one that the run began with: configuration and tokenizer come from it.

    One without weights is taken as it is.

    Raises:
        ConfigError: it is another one, unknown or not there.
    """
    base, record = str(source.base), None if source.run is None else read_record(source.run)
    was = None if record is None else record.get("contents", {}).get("model.path")
    if was is not None and has_weights(source.base) and model_identity(base) != was:
        raise ConfigError(
            f"{source.path}: {base} holds another model than the one that the run was trained from; name that one by "
            f"{source.base_option}DIR"
        )


def run_settings(run: Path | None) -> dict[str, Any]:
    """A run's ``config.yaml`` as a plain tree; empty without one.

    Raises:
        ConfigError: it can't be read.
    """
    if run is None or not (run / "config.yaml").exists():
        return {}
    try:
        tree = yaml.load((run / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{run / 'config.yaml'}: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model", {}), dict):
        raise ConfigError(f"{run / 'config.yaml'}: not a run's configuration")
    return tree


def shown_setting(settings: Mapping[str, Any], key: str) -> str:
    """A run's setting for people, by its dotted key; ``unknown`` where another version, or a hand, has left it out."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return "unknown" if value is None else str(value)


def lora_of(source: ModelSource) -> Lora | None:
    """The adapters that a run trains; None where it trains the weights themselves.

    Raises:
        ConfigError: the run's configuration can't be read.
    """
    settings = run_settings(source.run).get("model", {}).get("lora")
    return None if settings is None else build(Lora, settings, "model.lora")


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that is being written or removed has another name."""
    return CheckpointDirectory(run / CHECKPOINTS, keep_last=1, keep_best=None).steps()


def _own_base(path: Path, base: Path | str | None, base_option: str) -> Path:
    if base is not None:
        named = base_option.rstrip(" =")
        raise ConfigError(f"{named} has no effect: {path} brings its own configuration and tokenizer")
    return path


def _base_of_run(run: Path | None, base: Path | str | None) -> Path | None:
    named = base or run_settings(run).get("model", {}).get("path")
    return None if named is None else Path(str(named)).absolute()
