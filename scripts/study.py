"""A study of algorithms on three small tasks: ``python scripts/study.py``; goes on where it was interrupted.

Each part compares arms on tasks over seeds (examples/study/design.py): AAPO with four other algorithms, its margin's
bounds and estimator, and completions of a policy that is behind. It leaves the runs below results/study, and from them
tables.md, study.json, learning_curves.svg and differences.svg. Base models are made by it. The task of words needs
reasoning-gym (bash scripts/peers.sh); settings of conf/train_aapo.yaml given as KEY=VALUE apply to all runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ and examples/ stand beside the scripts

from examples.study import report
from examples.study.design import PARTS, SEEDS, runs_of
from examples.study.runs import make_runs
from nemo_aapo.cli.main import exit_code
from nemo_aapo.utils.files import require_directory

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/study"), help="the study's directory (%(default)s)")
    parser.add_argument("--parts", type=_words, default=tuple(PARTS), help=f"of {','.join(PARTS)}; by default all")
    parser.add_argument("--seeds", type=_numbers, default=SEEDS, help="1,2,3,4,5")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    parser.add_argument("--report", action="store_true", help="make no runs; sum up those that are there")
    parser.add_argument("--publish", action="store_true", help="put tables and pictures into docs/ as well")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of all runs")
    return exit_code(lambda: study(parser.parse_intermixed_args()))


def study(words: argparse.Namespace) -> int:
    """Make the runs, then sum them up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = words.out.absolute()
    require_directory(directory, f"--out {words.out}")
    runs = runs_of(words.parts, words.seeds, tuple(words.settings))
    if not words.report:
        try:
            make_runs(runs, directory, words.jobs, lambda text: print(text, flush=True))
        except KeyboardInterrupt:
            print(f"{words.out}: stopped; the same command goes on from there", file=sys.stderr)
            raise
    tables = report.write(runs, directory)
    print(f"\n{tables}\n{directory / 'tables.md'}")
    if words.publish:
        publish(directory, tables)
    return 0


def publish(directory: Path, tables: str) -> None:
    """Put what the study left into its page."""
    from benchmarks.page import write_section

    write_section(DOCS / "results" / "study.md", "study", tables)
    shutil.copy(directory / "study.json", DOCS / "results" / "study.json")
    for name in ("learning_curves", "differences"):
        shutil.copy(directory / f"{name}.svg", DOCS / "images" / f"study_{name}.svg")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between them, as in 1,2,3") from None


if __name__ == "__main__":
    raise SystemExit(main())
