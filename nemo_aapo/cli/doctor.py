"""Looks at a machine or an allocation before it burns hours: ``python scripts/doctor.py [OPTIONS] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from nemo_aapo.cli.main import exit_code, run_command
from nemo_aapo.config import Config
from nemo_aapo.doctor import catalog, ranks, report
from nemo_aapo.doctor.finding import Check
from nemo_aapo.errors import FAILED
from nemo_aapo.prepare import settings_of

DESCRIPTION = f"""Look at this machine or allocation before it burns hours. Without settings: the machine. With the
settings of a run, as train.py takes them: all that the run needs, too. Alone, or under torchrun or srun on all its
ranks. One line a check: ok, warning, failure with its remedy, skipped. Exit code: 0 no failure, 1 a failure, 2 a
setting that can't work.

  --json               the report as JSON on standard output, the lines on standard error
  --only NAME,NAME     these checks only
  --skip NAME,NAME     all but these
  --quick              seconds at most, and nothing that disturbs a run on this machine: for health checks

Checks: {", ".join(catalog.NAMES)}"""


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return exit_code(lambda: _look(words))


def _look(words: Sequence[str]) -> int:
    os.environ.update(ranks.slurm_environment(os.environ))
    options, settings = read_options(words)
    checks = catalog.select(options.only, options.skip, options.quick)
    if not settings:
        return examine(checks, None, options.json)
    return run_command(
        lambda command: settings_of(command)[0],  # what files and machine would refuse is for the checks to find
        lambda config: examine(checks, config, options.json),
        description=DESCRIPTION,
        words=settings,
    )


def read_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the other words.

    Raises:
        argparse.ArgumentError: an option without its value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--only", "--skip"):
        parser.add_argument(name, type=lambda names: names.split(","), default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_known_args(words)


def examine(checks: list[Check], config: Config | None, as_json: bool) -> int:
    """Run the checks; rank 0 says what they found as they find it. The exit code."""
    place, start = ranks.place_of(os.environ), time.monotonic()
    screen = report.Screen(sys.stderr if as_json else sys.stdout)
    ranks.examine(checks, config, place, screen)
    if place.rank == 0:
        found, seconds = screen.findings, time.monotonic() - start
        print(report.to_json(found, place, seconds) if as_json else report.summary(found, seconds), flush=True)
    return FAILED if report.failed(screen.findings) else 0
