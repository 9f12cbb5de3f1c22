"""Trains for thousands of steps, and says how memory, descriptors, threads and children of its processes grow.

python scripts/soak.py local remote async --steps 4000       on the CPU; about two minutes for 1,000 steps of each
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ stands beside the scripts, in a checkout

from benchmarks import soak
from nemo_aapo.errors import FAILED, RunError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(soak.KINDS)}; all of them, unless named")
    parser.add_argument("--steps", type=int, default=soak.Plan.steps, help="steps of each run")
    parser.add_argument("--limit", type=float, default=2.0, help="MiB of growth in 1,000 steps that are one too many")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(soak.KINDS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what it started ends with it
    plan = soak.Plan(arguments.steps, settled=arguments.steps // 4, every=max(1, arguments.steps // 40))
    found = {}
    try:
        for kind in arguments.kinds or soak.KINDS:
            with tempfile.TemporaryDirectory(prefix="aapo_soak_") as folder:
                print(f"{kind}: {folder}", flush=True)
                found[kind] = soak.measure(kind, plan, Path(folder), lambda text: print(text, flush=True))
    except RunError as error:
        print(error, file=sys.stderr)
        return FAILED
    print(f"\nAt the end, and (growth in 1,000 steps) after the first {plan.settled}:\n\n{soak.report(found, plan)}")
    grown = [soak.growth(looks, plan, process)["rss"] for looks in found.values() for process in looks[max(looks)]]
    return FAILED if max(grown) > arguments.limit else 0


if __name__ == "__main__":
    raise SystemExit(main())
