"""Compares algorithms on the quickstart's task: ``python scripts/study.py``; goes on where it was interrupted.

One process for each algorithm and seed, one after the other, same budget and same settings. It leaves the runs,
results/study/tables.md and results/study/learning_curves.svg. Run scripts/quickstart.sh or scripts/make_base_model.py
before; settings of conf/train_aapo.yaml given as KEY=VALUE apply to all runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ and examples/ stand beside the scripts

from examples.study import analysis, picture
from examples.study.runs import Study, run_all
from nemo_aapo.cli.main import exit_code
from nemo_aapo.utils.files import write_atomic

TABLES, PICTURE = "tables.md", "learning_curves.svg"


def main() -> int:
    default = Study(Path("results/study"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default.directory, help="the study's directory (%(default)s)")
    parser.add_argument(
        "--algorithms", type=_words, default=default.algorithms, help="choices of algorithm=: aapo,gpg,grpo"
    )
    parser.add_argument("--seeds", type=_numbers, default=default.seeds, help="1,2,3,4,5")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps of each run (%(default)s)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of all runs")
    words = parser.parse_intermixed_args()
    return exit_code(lambda: compare(words))


def compare(words: argparse.Namespace) -> int:
    """Make the runs, then sum them up."""
    study = Study(words.out, words.algorithms, words.seeds, words.steps, tuple(words.settings))
    try:
        run_all(study, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print(f"{words.out}: stopped; the same command goes on from there", file=sys.stderr)
        raise
    runs = analysis.read_runs(study)
    tables = analysis.tables(runs)
    write_atomic(study.directory / TABLES, tables)
    write_atomic(study.directory / PICTURE, picture.learning_curves(runs))
    print(f"\n{tables}\n{study.directory / TABLES}\n{study.directory / PICTURE}")
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between them, as in 1,2,3") from None


if __name__ == "__main__":
    raise SystemExit(main())
