"""The packages that a job will import, looked for without importing them: an extra that was left out is named early."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from nemo_aapo import lines
from nemo_aapo.config import Config
from nemo_aapo.config.sources import Source
from nemo_aapo.errors import ConfigError
from nemo_aapo.prepare.files import named_sources

EXTRAS = "pip install 'nemo_aapo[cpu]' or 'nemo_aapo[gpu]'"
PINS = lines.installed().pins


@dataclass(frozen=True, slots=True)
class Needed:
    """A package, what it is needed for, and how to get it."""

    module: str
    """What is imported of it: ``pyarrow``, ``megatron.bridge``."""
    distribution: str
    """What pip calls it."""
    purpose: str
    remedy: str = EXTRAS


BRIDGE = Needed(
    "megatron.bridge",
    "megatron-bridge",
    "reading and writing weights",
    f"pip install --no-deps megatron-bridge=={PINS['megatron-bridge']}, after the extra cpu or gpu: with its "
    "dependencies pip would build packages that need CUDA's toolchain (docs/guide/install.md)",
)
CORE = Needed("megatron.core", "megatron-core", "training", f"pip install megatron-core=={PINS['megatron-core']}")
MEGATRON = (CORE, BRIDGE)
MATH = Needed("math_verify", "math-verify", "the reward accuracy")
GYM = Needed(
    "reasoning_gym",
    "reasoning-gym",
    "reasoning_gym:TASK and the reward of that name",
    "pip install --no-deps -r requirements/reasoning_gym.txt",
)
SERVERS = Needed("aiohttp", "aiohttp", "rollout servers")


def check_packages(needed: Iterable[Needed]) -> None:
    """Refuse a job whose packages are not all there, or whose Megatron is of two lines.

    Raises:
        ConfigError: the first that is missing, what needs it, and how to get it; or what belongs to the other line.
    """
    for package in needed:
        if not is_installed(package):
            raise ConfigError(
                f"{package.purpose} needs the package {package.distribution}, which is not installed: {package.remedy}"
            )
        if package is CORE and (strangers := [*lines.strangers()]):
            raise ConfigError(
                f"megatron-core is of the line {lines.installed().name}, but {', '.join(strangers)}: install one line "
                "whole (docs/guide/install.md)"
            )


def packages_of(config: Config, given: Collection[str] = ()) -> Iterator[Needed]:
    """What a training run imports beyond the dependencies that pip always brings.

    Args:
        given: parts that the caller brings in place of the configured ones.
    """
    yield from MEGATRON
    yield from loggers_need(config)
    if config.rollout.engine == "remote":
        yield from servers_need(config)
    if "rewards" not in given:
        yield from rewards_need(config.rewards)
    for _, source in named_sources(config.data, given):
        yield from source_needs(source)


def servers_need(config: Config) -> Iterator[Needed]:
    """What a trainer's rollout servers import, and so does the trainer."""
    yield SERVERS
    if config.rollout.refit == "delta":
        yield Needed("pyarrow", "pyarrow", "rollout.refit=delta (zstd)")


def loggers_need(config: Config) -> Iterator[Needed]:
    """What the loggers import."""
    settings = config.exp_manager
    asked = [name for name in ("tensorboard", "wandb", "mlflow") if getattr(settings, f"create_{name}_logger")]
    for name in asked:
        setting = f"exp_manager.create_{name}_logger"
        if name != "mlflow":
            yield Needed("nemo", "nemo-toolkit", f"{setting}=true", f"{EXTRAS}; or {setting}=false")
        yield Needed("lightning", "lightning", f"{setting}=true", f"{EXTRAS}; or {setting}=false")
    for name, distribution in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        if name in asked:
            remedy = f"pip install --no-deps -r requirements/{name}.txt"
            yield Needed(name, distribution, f"exp_manager.create_{name}_logger=true", remedy)


def rewards_need(entries: Iterable[Mapping[str, Any]]) -> Iterator[Needed]:
    """What scoring by these entries of ``rewards`` imports."""
    for entry in entries:
        names = {entry["name"], entry.get("verifier", "accuracy" if entry["name"] == "cosine" else None)}
        if "accuracy" in names:
            yield MATH
        if "reasoning_gym" in names:
            yield GYM


def source_needs(source: Source) -> Iterator[Needed]:
    """What reading the source imports."""
    path = Path(source.path)
    if source.task is not None:
        yield GYM
    elif source.on_hub or path.is_dir():
        yield Needed("datasets", "datasets", f"reading {source.path}")
    elif path.suffix in (".parquet", ".arrow"):
        yield Needed("pyarrow", "pyarrow", f"reading {source.path}")


def is_installed(package: Needed) -> bool:
    """Whether it can be imported, as far as files tell; nothing is imported, no parent of it either."""
    parent, _, child = package.module.partition(".")
    spec = PathFinder.find_spec(parent)
    if spec is not None:
        places = spec.submodule_search_locations or ()
        if not child or any((Path(place) / child).is_dir() for place in places):
            return True
    try:  # installed in a way that only its own finder knows, as editable packages are
        return bool(metadata.version(package.distribution))
    except metadata.PackageNotFoundError:
        return False
