"""The parts of the demonstration, in their order; scripts/real_model.sh makes what they need."""

from __future__ import annotations

import argparse
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.page import write_section
from examples.real_model import report
from examples.real_model.runs import ALGORITHMS, Demonstration
from nemo_aapo.cli.main import exit_code

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/real_model.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/real_model"), help="where it is made (%(default)s)")
    parser.add_argument("parts", nargs="*", metavar="PART", help="model data aapo gpg grpo resume report; publish")
    given = parser.parse_args()
    here = Demonstration(given.out.absolute(), partial(print, flush=True))
    parts: dict[str, Callable[[], object]] = {
        "model": here.model,
        "data": here.data,
        **{name: partial(here.train, name) for name in ALGORITHMS},
        "resume": here.resume,
        "report": lambda: print(report.write(here.directory)),
        "publish": partial(publish, here.directory),
    }
    if unknown := set(given.parts) - set(parts):
        parser.error(f"{', '.join(sorted(unknown))}: no such part; there is {', '.join(parts)}")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way the run at hand saves what it has

    def make() -> int:
        for name in given.parts or [part for part in parts if part != "publish"]:
            parts[name]()
        return 0

    return exit_code(make)


def publish(directory: Path) -> None:
    """Put the report into its page."""
    write_section(DOCS / "results" / "real_model.md", "real model", report.write(directory))
    shutil.copy(directory / "results.json", DOCS / "results" / "real_model.json")
    shutil.copy(directory / "curves.svg", DOCS / "images" / "real_model.svg")


if __name__ == "__main__":
    raise SystemExit(main())
