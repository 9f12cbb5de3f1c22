"""Plans a run, without a GPU: ``python scripts/plan.py model=NAME hardware=h100 KEY=VALUE ...``; see ``--help``."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence

from nemo_aapo.cli.main import exit_code
from nemo_aapo.config.command_line import read_command_line, usage
from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import models, plan, report
from nemo_aapo.prepare.plan import OWN_WORDS, prepare_plan, split

DOES_NOT_FIT = 1
DESCRIPTION = "\n".join(
    (
        "What a run with these settings would take: memory of each rank by part, a lower bound on a step's time by",
        "phase, which layouts fit, what stored reference rewards save. Data and weights need not be there.",
        "Exit code 0: it fits, 1: it does not, 2: it can't be.",
        "",
        *(f"  {word + '=':<26}{meaning}" for word, meaning in OWN_WORDS.items()),
        f"  {'--json':<26}all figures as JSON, unrounded: bytes, seconds, FLOPs",
        "",
        *textwrap.wrap(f"Models: {', '.join(models.KNOWN)}", 110),
    )
)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return exit_code(lambda: _plan([word for word in words if word != "--json"], as_json="--json" in words))


def _plan(words: Sequence[str], as_json: bool) -> int:
    command = read_command_line(split(words)[1])
    if command.show == "config":
        raise ConfigError("--cfg shows what a run would be given: python scripts/train.py --cfg job KEY=VALUE ...")
    if command.show == "help":
        print(usage(DESCRIPTION, command), end="")
        return 0
    made = plan.make(*prepare_plan(words))
    print(json.dumps(report.tree(made), indent=1) if as_json else report.text(made), end="\n" if as_json else "")
    return 0 if made.fits else DOES_NOT_FIT
