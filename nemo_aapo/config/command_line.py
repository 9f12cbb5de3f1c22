"""The words after a script's name: settings, the page they belong to, and ``--help`` made from that page."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from nemo_aapo.config import Config, EvaluationConfig, parse, parse_evaluation
from nemo_aapo.errors import ConfigError

FROZEN = "frozen"
"""Name of the page that a launcher leaves in the run directory: everything is resolved in it."""


@dataclass(frozen=True)
class Page:
    """A page of settings in ``conf/``, and what it may hold."""

    name: str
    """Of the file, without ``.yaml``."""
    schema: type
    parse: Callable[[dict[str, Any]], Any]
    """The composed tree -> the typed configuration."""
    folders: tuple[str, ...] | None
    """The folders beside it that it takes choices from; None: all."""
    main_keys: tuple[str, ...]
    """What ``--help`` shows of it."""


TRAINING = Page(
    "train_aapo",
    Config,
    parse,
    None,
    (
        "run.name",
        "run.dir",
        "seed",
        "model.path",
        "data.train",
        "data.validation",
        "prompts_per_step",
        "group_size",
        "max_tokens_per_microbatch",
        "trainer.num_nodes",
        "trainer.devices",
        "trainer.max_steps",
        "trainer.val_check_interval",
        "checkpoint.save_interval",
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_size",
        "model.sequence_parallel",
        "model.optim.lr",
        "rollout.max_new_tokens",
    ),
)
EVALUATION = Page(
    "evaluate",
    EvaluationConfig,
    parse_evaluation,
    ("precision",),
    (
        "run.name",
        "run.dir",
        "seed",
        "model.path",
        "model.base",
        "benchmarks",
        "prompt_template",
        "chat_template",
        "samples",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.max_new_tokens",
        "problems_per_batch",
        "trainer.num_nodes",
        "trainer.devices",
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_size",
    ),
)


@dataclass(frozen=True)
class CommandLine:
    """What the words ask for."""

    overrides: list[str]
    """``KEY=VALUE`` words, in Hydra's grammar."""
    directory: Path
    """Absolute; the page, and the folders of choices beside it."""
    page: str
    """Name of the page in it, without ``.yaml``."""
    show: Literal["help", "config"] | None
    """Say something instead of running."""
    kind: Page = TRAINING

    def groups(self) -> dict[str, list[str]]:
        """Folder beside the page -> the choices that it offers."""
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


def read_command_line(argv: list[str], kind: Page = TRAINING) -> CommandLine:
    """Split the words into settings and the few options that Hydra's scripts have.

    Args:
        kind: of the page; its own one is taken unless the words name another of the kind.

    Raises:
        ConfigError: an option that does not exist, or a page that is not there.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default=kind.name)
    words = parser.parse_intermixed_args(argv)
    directory = Path(words.config_path).resolve() if words.config_path else config_directory()
    page = words.config_name.removesuffix(".yaml")
    if not (directory / f"{page}.yaml").is_file():
        raise ConfigError(f"--config-path, --config-name: there is no {directory / page}.yaml")
    show = "help" if words.help else "config" if words.cfg else None
    return CommandLine(words.overrides, directory, page, show, kind)


def usage(description: str, command: CommandLine) -> str:
    """The text of ``--help``: the main settings with their defaults and comments, as the page has them."""
    page = command.directory / f"{command.page}.yaml"
    comments = read_page(page)
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--cfg job] [--config-path DIR] [--config-name PAGE] KEY=VALUE ...",
        "",
        description,
        "",
        "  --cfg job           print the composed configuration and stop",
        "  --config-path DIR   another folder of pages (relative to the working directory)",
        "  --config-name PAGE  another page in it",
        "",
        "Choices:",
        *(f"  {group}={'|'.join(names)}" for group, names in command.groups().items()),
        "",
        f"Main settings, with their defaults (all of them: {page}):",
    ]
    for key in command.kind.main_keys:
        if key in comments:
            default, comment = comments[key]
            lines.append(f"  {key + '=' + default:<44} {comment}")
    return "\n".join(lines) + "\n"


def read_page(page: Path) -> dict[str, tuple[str, str]]:
    """Dotted key -> (value, comment) as they stand on a page of settings, one key a line; lists are one value."""
    found: dict[str, tuple[str, str]] = {}
    above: list[tuple[int, str]] = []  # (indent, key) of the sections around a line
    for line in page.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(?: +([^#\s]\S*(?: \S+)*?))?(?: +# (.*))?$", line)
        if match is None:
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3] or "", match[4] or ""
        above = [(width, name) for width, name in above if width < indent] + [(indent, key)]
        found[".".join(name for _, name in above)] = (value, comment)
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Settings are given as KEY=VALUE, without dashes; --help shows the main ones")
