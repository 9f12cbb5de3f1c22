"""Shows whether an algorithm keeps its promises: ``nemo-aapo check-algorithm my_algorithm.py:MyClass``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_aapo.cli.main import exit_code
from nemo_aapo.config.compose import load_config
from nemo_aapo.errors import FAILED, ConfigError
from nemo_aapo.utils.libraries import importing

USAGE = """\
usage: nemo-aapo check-algorithm my_algorithm.py:MyClass [FIELD=VALUE ...]
       nemo-aapo check-algorithm NAME [SETTING=VALUE ...]    one of those that are built in

Shows on a made-up batch that an algorithm's loss and gradient do not depend on how the batch is cut into micro-batches
and over ranks, and that they are finite where a run may take them. Exit code 0: all promises hold, 1: one does not.
"""


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or "-h" in words or "--help" in words:
        print(USAGE, end="")
        return 0
    return exit_code(lambda: _check(words[0], words[1:]))


def _check(name: str, fields: Sequence[str]) -> int:
    if wrong := [word for word in fields if "=" not in word]:
        raise ConfigError(f"{wrong[0]!r} is not of the form FIELD=VALUE")
    settings = ", ".join(word.replace("=", ": ", 1) for word in fields)
    chosen = [f"algorithm.custom='{name}'", f"algorithm.settings={{{settings}}}"]
    if ":" not in name:
        chosen = [f"algorithm={name}", *(f"algorithm.{word}" for word in fields)]
    config = load_config(["model.path=none", "data.train=none", "data.validation=none", *chosen]).algorithm
    with importing():
        from nemo_aapo.algorithms.check import check
        from nemo_aapo.algorithms.registry import algorithm_of
    findings, said = check(algorithm_of(config), config), {""}
    for finding in findings:
        print(f"{'WRONG' if finding.wrong else 'ok':<7}{finding.promise}")
        if finding.wrong not in said:  # what ends a hook ends it for each promise
            print(f"       {finding.wrong}")
        said.add(finding.wrong)
    return FAILED if any(finding.wrong for finding in findings) else 0
