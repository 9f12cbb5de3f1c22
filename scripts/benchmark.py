"""Measures this code against its alternatives, in one process and in turns: ``python scripts/benchmark.py rollout``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_aapo.errors import RunError
from nemo_aapo.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def rollout(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine beside transformers' generate, then the cost of the algorithms' steps."""
    import torch

    from nemo_aapo import parallel
    from nemo_aapo.benchmarks import generate, steps
    from nemo_aapo.libraries import quiet
    from nemo_aapo.policy import cpu

    quiet()
    torch.set_num_threads(1)
    cpu.install()
    parallel.initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0, timeout_s=600)
    try:
        with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
            engine = generate.compare(generate.QUICK if arguments.quick else generate.Plan(), Path(folder) / "generate")
            print("Completion tokens per second, median (lowest to highest); ratio: engine over transformers' generate")
            print(generate.report(engine), end="\n\n", flush=True)
            algorithms = steps.compare(steps.QUICK if arguments.quick else steps.Plan(), Path(folder) / "steps")
            print("Milliseconds of a training step, median (lowest to highest)")
            print(steps.report(algorithms), flush=True)
    finally:
        parallel.shutdown()
    return {"generate": [asdict(row) for row in engine], "steps": [asdict(row) for row in algorithms]}


def gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """One GPU: the learner's MFU by precision, decoding against the bandwidth floor, log-prob memory, parity."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmark.py gpu: no CUDA GPU on this machine")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from nemo_aapo import parallel
    from nemo_aapo.benchmarks import gpu, gpu_report
    from nemo_aapo.libraries import quiet

    quiet()
    parallel.initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0, timeout_s=600)
    try:
        with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
            found = gpu.measure(gpu.QUICK if arguments.quick else gpu.Plan(), Path(folder))
    finally:
        parallel.shutdown()
    for part in gpu_report.report(found):
        print(f"\n{part}", flush=True)
    return found


def rewards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Items a second of each reward on one core, and what hostile completions cost."""
    from nemo_aapo.benchmarks import rewards as measured

    plan = measured.QUICK if arguments.quick else measured.Plan()
    speeds, costs = measured.speeds(plan), measured.hostile(plan)
    print(measured.report(speeds, costs), flush=True)
    return {"speeds": [asdict(row) for row in speeds], "hostile": [asdict(row) for row in costs]}


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Training steps beside TRL's: a quarter of an hour. Needs scripts/peers.sh, writes docs/benchmarks.md."""
    from nemo_aapo.benchmarks.peers import compare, picture, plan, report
    from nemo_aapo.libraries import quiet

    quiet()
    folder = Path("results") / ("peers_quick" if arguments.quick else "peers")
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as place:
        for found in compare.measure(
            plan.QUICK if arguments.quick else plan.Plan(), Path(place), lambda text: print(text, flush=True)
        ):
            tables = report.tables(found, (before, os.getloadavg()[0]))
            write_atomic(folder / "tables.md", tables)
            write_atomic(folder / "figures.json", json.dumps(asdict(found), indent=1) + "\n")
    drawn = picture.bars(report.ratios(found))
    write_atomic(folder / "ratios.svg", drawn)
    print(f"\n{tables}", flush=True)
    if not arguments.quick:
        page = ROOT / "docs" / "benchmarks.md"
        write_atomic(page, report.put_between_marks(page.read_text(), tables, page))
        write_atomic(ROOT / "docs" / "images" / "peers.svg", drawn)
    return asdict(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    for run in (rollout, gpu, rewards, peers):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    try:
        figures = arguments.run(arguments)
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        write_atomic(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
