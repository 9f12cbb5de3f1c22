"""Kills tiny training runs at random moments, and checks that each ends as if nothing had happened.

python scripts/stress.py --seeds 20       on the CPU; about a quarter of a minute a seed
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests stand beside the scripts, in a checkout

from tests.chaos import Chaos, draw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aapo_stress_"))
    chaos = Chaos(folder)
    print(f"runs and logs: {folder}")
    print(f"{'seed':>4}  {'layout':<7} {'lives':>5} {'seconds':>7}  result; killed", flush=True)
    failures = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        layout, kills = draw(seed)
        start = time.monotonic()
        try:
            lives = chaos.survive(f"seed_{seed:03d}", layout, kills)
            result = f"same  {'; '.join(life.story() for life in lives if life.kill)}"
        except AssertionError as error:
            failures += 1
            result = f"WRONG {error}"
        seconds = time.monotonic() - start
        print(f"{seed:>4}  {layout!s:<7} {len(kills) + 1:>5} {seconds:>7.1f}  {result}", flush=True)
    print(f"{arguments.seeds - failures} of {arguments.seeds} runs ended in the weights of an uninterrupted one")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
