"""Measures this code against its alternatives, in one process and in turns: ``python scripts/benchmark.py rollout``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ and examples/ stand beside the scripts

from nemo_aapo.errors import FAILED, ConfigError, RunError
from nemo_aapo.utils.files import write_atomic
from nemo_aapo.utils.tables import markdown, plain

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
ROOT = Path(__file__).resolve().parents[1]
GUARD_FILE, DOCS = ROOT / "tests" / "guard.json", ROOT / "docs"
PROFILER_QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Before torch is imported: no notes of when profiling begins and ends."""


@contextlib.contextmanager
def one_rank() -> Iterator[Path]:
    """Inside, this process is a job of one rank and one thread; gives a folder, which goes with it."""
    from nemo_aapo.utils.libraries import quiet

    quiet()
    import torch

    from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

    torch.set_num_threads(1)
    initialize_model_parallel(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0, timeout_s=600)
    try:
        with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
            yield Path(folder)
    finally:
        destroy_model_parallel()


def rollout(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine beside transformers' generate, with and without speculation, and the algorithms' steps."""
    from benchmarks import generate, speculation, steps

    with one_rank() as folder:
        engine = generate.compare(generate.QUICK if arguments.quick else generate.Plan(), folder / "generate")
        print("Completion tokens per second, median (lowest to highest); ratio: engine over transformers' generate")
        print(generate.report(engine), end="\n\n", flush=True)
        guessed = speculation.compare(speculation.QUICK if arguments.quick else speculation.Plan(), folder)
        print("Decoding without speculation over decoding with it, median (lowest to highest)")
        print(speculation.report(guessed), end="\n\n", flush=True)
        algorithms = steps.compare(steps.QUICK if arguments.quick else steps.Plan(), folder / "steps")
        print("Milliseconds of a training step, median (lowest to highest)")
        print(steps.report(algorithms), flush=True)
    parts: dict[str, Any] = {"generate": engine, "speculation": guessed, "steps": algorithms}
    return {name: [asdict(row) for row in rows] for name, rows in parts.items()}


def products(arguments: argparse.Namespace) -> dict[str, Any]:
    """Products of decoding at 135M, by the weight's layout: a minute; writes docs/results/notebook.md."""
    from benchmarks import products
    from benchmarks.page import write_section

    rows = products.measure(products.QUICK if arguments.quick else products.Plan())
    print(plain(*products.table(rows)), flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "notebook.md", "products", markdown(*products.table(rows)))
    return {"rows": [asdict(row) for row in rows]}


def gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """One GPU: the learner's MFU by precision, decoding against the bandwidth floor, log-prob memory, parity."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmark.py gpu: no CUDA GPU on this machine")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from benchmarks import gpu, gpu_report

    with one_rank() as folder:
        found = gpu.measure(gpu.QUICK if arguments.quick else gpu.Plan(), folder)
    for part in gpu_report.report(found):
        print(f"\n{part}", flush=True)
    return found


def rewards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Items a second of each reward on one core, and what hostile completions cost."""
    from benchmarks import rewards as measured

    plan = measured.QUICK if arguments.quick else measured.Plan()
    speeds, costs = measured.speeds(plan), measured.hostile(plan)
    print(measured.report(speeds, costs), flush=True)
    return {"speeds": [asdict(row) for row in speeds], "hostile": [asdict(row) for row in costs]}


def experts(arguments: argparse.Namespace) -> dict[str, Any]:
    """A layer of experts on a CPU beside mcore's own, and beside a dense layer of the same FLOPs: half a minute."""
    from benchmarks import experts

    with one_rank() as folder:
        rows = experts.compare(experts.QUICK if arguments.quick else experts.Plan(), folder)
    print("CPU time of forward and backward pass as a multiple of the dense layer's, median (lowest to highest)")
    print(experts.report(rows), flush=True)
    return {"rows": [asdict(row) for row in rows]}


def refits(arguments: argparse.Namespace) -> dict[str, Any]:
    """A rollout server's memory over 3,000 refits: four minutes; 1 if it grows by 1 MiB in 1,000."""
    from benchmarks import refits
    from nemo_aapo.utils.libraries import quiet

    quiet()
    plan = refits.QUICK if arguments.quick else refits.Plan()
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        found = refits.measure(plan, Path(folder), lambda text: print(text, flush=True))
    print(f"after the first {plan.settled}: {refits.growth(found, plan):.2f} MiB in 1,000 refits")
    return {str(count): size for count, size in found.items()}


def refit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of a refit of two servers, of each kind; one minute; writes docs/results/benchmarks.md."""
    from benchmarks import refit
    from benchmarks.page import write_section
    from nemo_aapo.utils.libraries import quiet

    quiet()
    plan = refit.QUICK if arguments.quick else refit.FULL
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        rows = refit.measure(plan, Path(folder))
    print(plain(*refit.table(rows)), flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", "refit", markdown(*refit.table(rows)))
    return {"rows": [asdict(row) for row in rows]}


def staleness(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step's time by rollout.async_depth on servers that wait for each token; writes docs/results/benchmarks.md."""
    from benchmarks import staleness
    from benchmarks.paced_run import alone
    from benchmarks.page import write_section

    plan = staleness.QUICK if arguments.quick else staleness.Plan()
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder, alone():
        rows = staleness.measure(plan, Path(folder), lambda text: print(text, file=sys.stderr, flush=True))
    print(plain(*staleness.table(rows)), flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", "staleness", markdown(*staleness.table(rows)))
        write_atomic(DOCS / "images" / "staleness.svg", staleness.picture(rows))
    return {"rows": [asdict(row) for row in rows], "load": os.getloadavg()[0]}


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Training steps beside TRL's: ten minutes. Needs scripts/peers.sh, writes docs/results/benchmarks.md."""
    from dataclasses import replace

    from benchmarks.page import write_section
    from benchmarks.peers import compare, picture, report
    from benchmarks.peers import plan as plans
    from nemo_aapo.utils.libraries import quiet

    quiet()
    section, plan = "peers", plans.QUICK if arguments.quick else plans.Plan()
    if arguments.models:
        section, plan = "peers at real sizes", plan if arguments.quick else plans.REAL
        plan = replace(plan, models=plans.models(arguments.models))
    folder = Path("results") / (section.replace(" ", "_") + ("_quick" if arguments.quick else ""))
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as place:
        for found in compare.measure(plan, Path(place), lambda text: print(text, flush=True)):
            tables = report.tables(found, (before, os.getloadavg()[0]), judged=not arguments.quick)
            write_atomic(folder / "tables.md", tables)
            write_atomic(folder / "figures.json", json.dumps(asdict(found), indent=1) + "\n")
    print(f"\n{tables}", flush=True)
    picture.draw(report.ratios(found), folder / "ratios.png")
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", section, tables)
        shutil.copy(folder / "ratios.png", DOCS / "images" / f"{section.replace(' ', '_')}.png")
    return asdict(found)


def guard(arguments: argparse.Namespace) -> dict[str, Any]:
    """Operators, allocations and collectives of a training step against tests/guard.json; 1 if they have grown."""
    os.environ |= PROFILER_QUIET
    from benchmarks import guard, ranks
    from benchmarks.workload import Workload, make_input

    try:
        before = guard.read(GUARD_FILE)
    except guard.GuardError:
        if not arguments.update:
            raise
        before = None
    now: guard.Counts = {}
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        make_input(Workload(), Path(folder))
        for name, layout in guard.LAYOUTS.items():
            print(f"counting a step of {name}", file=sys.stderr, flush=True)
            now |= guard.figures(name, ranks.run(guard.count, folder, layout, **layout))
    rows = guard.compare(before or now, now)
    print(guard.report(rows))
    if arguments.update:
        guard.write(GUARD_FILE, now)
        print(f"\nwrote {GUARD_FILE}: commit it with the change that explains it")
    elif grown := [row for row in rows if row.grown]:
        raise guard.GuardError(guard.complaint(grown))
    return now


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a step's cost grows; what layouts and a run's start cost; writes its part of docs/results/benchmarks.md."""
    os.environ |= PROFILER_QUIET
    from nemo_aapo.utils.libraries import quiet

    quiet()
    from benchmarks import scaling
    from benchmarks.page import write_section

    plan = scaling.QUICK if arguments.quick else scaling.Plan()
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        print("starting runs", file=sys.stderr, flush=True)
        start = scaling.starting(plan, Path(folder) / "start")
        print("growth of a step's cost", file=sys.stderr, flush=True)
        with one_rank() as place:
            rows = scaling.dimensions(plan, place)
        print("layouts", file=sys.stderr, flush=True)
        layouts = scaling.layouts(plan, Path(folder) / "layouts")
    tables = scaling.report(rows, layouts, start)
    print(f"{scaling.as_text(tables)}\n\n{scaling.load_line()}", flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", "scaling", scaling.as_markdown(tables))
        write_atomic(DOCS / "images" / "scaling.svg", scaling.picture(rows))
    return {
        "growth": [asdict(row) for row in rows],
        "layouts": [asdict(row) for row in layouts],
        "start": asdict(start),
        "machine": scaling.load_line(),
    }


def context(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory of a step on a long sequence, whole and cut over two ranks; writes docs/results/benchmarks.md."""
    os.environ |= PROFILER_QUIET
    from benchmarks import context
    from benchmarks.page import write_section

    plan = context.QUICK if arguments.quick else context.Plan()
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        rows = context.measure(plan, Path(folder))
    print(plain(*context.table(rows)), flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", "context", markdown(*context.table(rows)))
    return {"rows": [asdict(row) for row in rows]}


def sharing(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step with shared prompts beside one without, prompts short to long; writes docs/results/benchmarks.md."""
    from benchmarks import sharing
    from benchmarks.page import write_section

    plan = sharing.QUICK if arguments.quick else sharing.Plan()
    with one_rank() as folder:
        rows = sharing.measure(plan, folder)
    print(plain(*sharing.table(rows)), flush=True)
    if not arguments.quick:
        write_section(DOCS / "results" / "benchmarks.md", "sharing", markdown(*sharing.table(rows)))
    return {"rows": [asdict(row) for row in rows]}


def parity(arguments: argparse.Namespace) -> dict[str, Any]:
    """How far engine and learner are apart: FP8, LoRA; writes docs/results/gpu.md and docs/results/notebook.md."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FP8 is emulated in a CPU's products
    from benchmarks import parity
    from benchmarks.page import write_section

    plan = parity.QUICK if arguments.quick else parity.Plan()
    with one_rank() as folder:
        rows, adapted = parity.fp8(plan, folder), parity.lora(plan, folder)
    tables = {"gpu": parity.fp8_table(rows), "notebook": parity.lora_table(adapted)}
    for page, table in tables.items():
        print(plain(*table), end="\n\n", flush=True)
        if not arguments.quick:
            write_section(DOCS / "results" / f"{page}.md", "parity", markdown(*table))
    return {"fp8": [asdict(row) for row in rows], "lora": [asdict(row) for row in adapted]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    runs = (
        *(rollout, products, gpu, experts, rewards, refits, refit),
        *(guard, scaling, context, sharing, staleness, parity, peers),
    )
    for run in runs:
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if run is guard:
            command.add_argument("--update", action="store_true", help="write the file anew instead of failing")
        else:
            command.add_argument(
                "--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing"
            )
        if run is peers:
            command.add_argument(
                "--models",
                nargs="+",
                metavar="MODEL",
                help="instead of 0.3M, 4M and 20M: 135M, or Hugging Face directories; minutes for each",
            )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    try:
        figures = arguments.run(arguments)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return FAILED
    if arguments.json:
        write_atomic(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
