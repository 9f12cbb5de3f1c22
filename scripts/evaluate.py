"""Measures models on benchmarks: ``python scripts/evaluate.py model.path=DIR KEY=VALUE ...``; ``compare A B``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_aapo.cli.main import config_main, exit_code
from nemo_aapo.config import EvaluationConfig
from nemo_aapo.config.command_line import EVALUATION
from nemo_aapo.evaluation.prompts import check_template
from nemo_aapo.evaluation.settings import check_model, find_model
from nemo_aapo.launch import local

DESCRIPTION = """Measure a model on benchmarks of mathematics: avg@k, pass@k, maj@k, each with its standard error over
the problems. model.path is a Hugging Face directory, a run directory of training or a checkpoint in one. Every
completion is kept; an interrupted evaluation goes on where it was, and more samples can be added later.

  evaluate.py model.path=DIR KEY=VALUE ...    measure; with trainer.devices=N on N ranks, or under torchrun
  evaluate.py compare A B [BENCHMARK ...]     two evaluations (their run.dir) on the same problems: a paired test"""


def check(config: EvaluationConfig) -> None:
    """Refuse what can be refused without torch: prompt, model, layout."""
    check_template(config.prompt_template)
    check_model(config, find_model(config), local.world_size_of(config))


def evaluate(config: EvaluationConfig, tree: dict[str, Any]) -> int:
    if local.starts_ranks(config.trainer.devices, config.trainer.num_nodes):
        command = [sys.executable, __file__, *sys.argv[1:]]
        return local.run_ranks_of(config, command, Path(config.run.dir) / "logs")
    from nemo_aapo.jobs import evaluate as evaluation_job  # torch and Megatron

    return evaluation_job.evaluate(config, tree)


def compare(argv: list[str]) -> int:
    from nemo_aapo.evaluation import compare as comparison

    parser = argparse.ArgumentParser(
        prog="evaluate.py compare",
        description="Two evaluations on the problems that both measured: the difference of their per-problem means, "
        "its standard error, a 95 % bootstrap interval and the p-value of a sign-flip permutation test, both paired "
        "by problem and seeded.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="run.dir of an evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="of another one; positive differences mean that B is better")
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="all that both have, unless named")
    words = parser.parse_args(argv)
    lines, notes = comparison.compare(words.a, words.b, words.benchmarks or None)
    print(f"A: {words.a}\nB: {words.b}\n\n{comparison.table(lines)}", end="")
    if left_out := [f"{line.benchmark} {line.left_out}" for line in lines if line.left_out]:
        print(f"\nproblems that only one of them has: {', '.join(left_out)}")
    for note in notes:
        print(f"not the same in both: {note}")
    return 0


def main(argv: list[str]) -> int:
    if argv and argv[0] == "compare":
        return exit_code(lambda: compare(argv[1:]))
    return config_main(evaluate, description=DESCRIPTION, argv=argv, check=check, through_nemo=False, page=EVALUATION)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
