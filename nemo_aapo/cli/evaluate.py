"""Measures models on benchmarks: ``python scripts/evaluate.py model.path=DIR KEY=VALUE ...``; ``compare A B``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_aapo.cli.main import command_of_ranks, exit_code, run_command, typed_path
from nemo_aapo.config.command_line import EVALUATION
from nemo_aapo.launch import local
from nemo_aapo.prepare.evaluation import EvaluationJob, prepare_evaluation

DESCRIPTION = """Measure a model on benchmarks of mathematics: avg@k, pass@k, maj@k, each with its standard error over
the problems. model.path is a Hugging Face directory, a run directory of training or a checkpoint in one. Every
completion is kept; an interrupted evaluation goes on where it was, and more samples can be added later.

  evaluate.py model.path=DIR KEY=VALUE ...    measure; with trainer.devices=N on N ranks, or under torchrun
  evaluate.py compare A B [BENCHMARK ...]     two evaluations (their run.dir) on the same problems: a paired test"""


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] == "compare":
        return exit_code(lambda: compare(words[1:]))
    task = functools.partial(evaluate, words=words)
    return run_command(prepare_evaluation, task, description=DESCRIPTION, words=words, kind=EVALUATION)


def evaluate(job: EvaluationJob, words: Sequence[str]) -> int:
    """Measure, on this rank or on ranks that are given the same words."""
    trainer = job.config.trainer
    if local.starts_ranks(trainer.devices, trainer.num_nodes):
        return local.run_ranks_of(job.config, command_of_ranks("evaluate", words), Path(job.config.run.dir) / "logs")
    from nemo_aapo.jobs import evaluate as evaluation_job  # torch and Megatron

    return evaluation_job.evaluate(job)


def compare(words: Sequence[str]) -> int:
    """Print how two evaluations differ."""
    from nemo_aapo.evaluation import compare as comparison

    parser = argparse.ArgumentParser(
        prog="evaluate.py compare",
        description="Two evaluations on the problems that both measured: the difference of their per-problem means, "
        "its standard error, a 95 % bootstrap interval and the p-value of a sign-flip permutation test, both paired "
        "by problem and seeded.",
    )
    parser.add_argument("a", type=typed_path, metavar="A", help="run.dir of an evaluation")
    parser.add_argument(
        "b", type=typed_path, metavar="B", help="of another one; positive differences mean that B is better"
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="all that both have, unless named")
    given = parser.parse_args(words)
    lines, notes = comparison.compare(given.a, given.b, given.benchmarks or None)
    print(f"A: {given.a}\nB: {given.b}\n\n{comparison.table(lines)}", end="")
    if left_out := [f"{line.benchmark} {line.left_out}" for line in lines if line.left_out]:
        print(f"\nproblems that only one of them has: {', '.join(left_out)}")
    for note in notes:
        print(f"not the same in both: {note}")
    return 0
