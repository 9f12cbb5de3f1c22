"""Looks at a machine or an allocation before it burns hours: ``python scripts/doctor.py [OPTIONS] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from nemo_aapo.cli.main import config_main, exit_code
from nemo_aapo.config import Config
from nemo_aapo.doctor import catalog, ranks, report
from nemo_aapo.doctor.finding import Check
from nemo_aapo.errors import FAILED

DESCRIPTION = f"""Look at this machine or allocation before it burns hours. Without settings: the machine. With the
settings of a run, as train.py takes them: all that the run needs, too. Alone, or under torchrun or srun on all its
ranks. One line a check: ok, warning, failure with its remedy, skipped. Exit code: 0 no failure, 1 a failure, 2 a
setting that can't work.

  --json               the report as JSON on standard output, the lines on standard error
  --only NAME,NAME     these checks only
  --skip NAME,NAME     all but these
  --quick              seconds at most, and nothing that disturbs a run on this machine: for health checks

Checks: {", ".join(catalog.NAMES)}"""


def main(argv: list[str]) -> int:
    return exit_code(lambda: look(argv))


def look(argv: list[str]) -> int:
    """Run the checks that the words ask for; the exit code."""
    os.environ.update(ranks.slurm_environment(os.environ))
    options, words = read_options(argv)
    checks = catalog.select(options.only, options.skip, options.quick)
    if not words:
        return examine(checks, None, options.json)

    def task(config: Config, tree: dict[str, Any]) -> int:
        return examine(checks, config, options.json)

    return config_main(task, description=DESCRIPTION, argv=words, through_nemo=False)


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own options, and the other words.

    Raises:
        argparse.ArgumentError: an option without its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--only", "--skip"):
        parser.add_argument(name, type=lambda names: names.split(","), default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_known_args(argv)


def examine(checks: list[Check], config: Config | None, as_json: bool) -> int:
    """Run the checks; rank 0 says what they found as they find it. The exit code."""
    place, start = ranks.place_of(os.environ), time.monotonic()
    screen = report.Screen(sys.stderr if as_json else sys.stdout)
    ranks.examine(checks, config, place, screen)
    if place.rank == 0:
        found, seconds = screen.findings, time.monotonic() - start
        print(report.to_json(found, place, seconds) if as_json else report.summary(found, seconds), flush=True)
    return FAILED if report.failed(screen.findings) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
