"""The arguments of a command: settings, the config file that they belong to, and ``--help``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from nemo_aapo.config import Config, EvaluationConfig, parse, parse_evaluation
from nemo_aapo.config.schema.config_file import entries_of
from nemo_aapo.config.schema.facts import settings_of
from nemo_aapo.errors import ConfigError

FROZEN = "frozen"
"""Name of the config file that a launcher leaves in the run directory: everything is resolved in it."""


@dataclass(frozen=True)
class ConfigFile:
    """A kind of config file in ``conf/``, and what it may hold."""

    name: str
    """The file's name, without ``.yaml``."""
    schema: type
    parse: Callable[[dict[str, Any]], Any]
    """Makes the typed configuration of the composed tree."""
    folders: tuple[str, ...] | None
    """The folders beside it that it takes choices from; None: all."""


TRAINING = ConfigFile("train_aapo", Config, parse, None)
EVALUATION = ConfigFile("evaluate", EvaluationConfig, parse_evaluation, ("precision",))


@dataclass(frozen=True)
class CommandLine:
    """What the arguments ask for."""

    overrides: list[str]
    """``KEY=VALUE`` arguments, in Hydra's grammar."""
    directory: Path
    """Holds the config file, and the folders of choices beside it; absolute."""
    config_file: str
    """Name of the config file, without ``.yaml``."""
    show: Literal["help", "config"] | None
    """Say something instead of running."""
    kind: ConfigFile = TRAINING

    def words(self) -> list[str]:
        """The arguments of another command that is to read the same."""
        return ["--config-path", str(self.directory), "--config-name", self.config_file, *self.overrides]

    def groups(self) -> dict[str, list[str]]:
        """Folder beside the config file -> the choices that it offers."""
        folders = sorted(path for path in self.directory.iterdir() if path.is_dir())
        taken = [path for path in folders if self.kind.folders is None or path.name in self.kind.folders]
        return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in taken}


def config_directory() -> Path:
    """``conf/``: beside the package in a checkout, inside it where it was installed.

    Raises:
        ConfigError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package.parent / "conf", package / "conf")
    for place in places:
        if (place / f"{TRAINING.name}.yaml").is_file():
            return place
    raise ConfigError(
        f"{TRAINING.name}.yaml is neither in {places[0]} nor in {places[1]}: name its folder by --config-path DIR"
    )


def read_command_line(argv: list[str], kind: ConfigFile = TRAINING) -> CommandLine:
    """Split the arguments into settings and the few options that Hydra's scripts have.

    Args:
        kind: of the config file; its own one is taken unless the arguments name another of the kind.

    Raises:
        ConfigError: an option that does not exist, or a config file that is not there.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default=kind.name)
    given = parser.parse_intermixed_args(argv)
    directory = Path(given.config_path).resolve() if given.config_path else config_directory()
    config_file = given.config_name.removesuffix(".yaml")
    if not (directory / f"{config_file}.yaml").is_file():
        raise ConfigError(f"--config-path, --config-name: there is no {directory / config_file}.yaml")
    show: Literal["help", "config"] | None = "help" if given.help else "config" if given.cfg else None
    return CommandLine(given.overrides, directory, config_file, show, kind)


def usage(description: str, command: CommandLine) -> str:
    """The text of ``--help``: the main settings with their meaning and their defaults in the config file."""
    file = command.directory / f"{command.config_file}.yaml"
    entries = entries_of(file.read_text(encoding="utf-8"))
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--cfg job] [--config-path DIR] [--config-name NAME] KEY=VALUE ...",
        "",
        description,
        "",
        "  --cfg job           print the composed configuration and stop",
        "  --config-path DIR   another folder of config files (relative to the working directory)",
        "  --config-name NAME  another config file in it",
        "",
        "Choices:",
        *(f"  {group}={'|'.join(names)}" for group, names in command.groups().items()),
        "",
        f"Main settings, with their defaults (all of them: {file}):",
    ]
    for setting in settings_of(command.kind.schema):
        if setting.facts.main and setting.key in entries:
            lines.append(f"  {setting.key + '=' + entries[setting.key].value:<44} {setting.facts.meaning}")
    return "\n".join(lines) + "\n"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if re.search(r"(--multirun|-m)\b", message):
            raise ConfigError(f"{message}. One run for each value: scripts/launch.py sweep KEY=A,B")
        raise ConfigError(f"{message}. Settings are given as KEY=VALUE, without dashes; --help shows the main ones")
