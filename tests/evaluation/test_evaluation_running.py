"""The newest checkpoint of a training that goes on: measured whole, and the training does not notice."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest

from nemo_aapo.launch.local import free_port, rank_environments
from tests.evaluation.test_evaluation_ranks import completions, evaluate, results, words
from tests.evaluation.test_evaluation_ranks import folder as evaluation_folder  # noqa: F401
from tests.forked import forking
from tests.training_runs import metrics, run, settings

pytestmark = pytest.mark.timeout(400)


def train(environment: dict[str, str], overrides: list[str], log: str) -> None:
    """In a process that was forked for it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.exit(run(overrides))


def evaluate_late(overrides: list[str]) -> int:
    """An evaluation that is so slow in reading the first checkpoint that the trainer removes it meanwhile."""
    from nemo_aapo.conversion import megatron_model

    tried, load_one = [], megatron_model.load_one

    def slow(path, module):
        tried.append(path.name)
        deadline = time.monotonic() + 100
        while len(tried) == 1 and path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return load_one(path, module)

    megatron_model.load_one = slow
    try:
        assert evaluate(overrides) == 0
    finally:
        megatron_model.load_one = load_one
    return tried


@pytest.mark.ranks
def test_the_newest_checkpoint_of_a_running_training_is_measured_whole_though_older_ones_are_removed(
    ranks,
    evaluation_folder,  # noqa: F811
):
    folder, run_dir = evaluation_folder, evaluation_folder / "at_work"
    more = ("trainer.max_steps=100000", "checkpoint.save_interval=1", "checkpoint.keep_last=1", "algorithm=gpg")
    overrides = settings(folder, run_dir, *more, "trainer.val_check_interval=0", "rollout.max_new_tokens=2")
    context = forking()
    (environment,) = rank_environments({}, 1, free_port())
    training = context.Process(target=train, args=(environment, overrides, str(folder / "log")), daemon=True)
    training.start()
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/step_*")):
        assert training.is_alive(), (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tried,) = ranks.run(evaluate_late, words(folder, "newest", f"model.path={run_dir}"), tp=None)
    step = int(re.search(r"\(step (\d+)\)", results(folder / "newest")["model"])[1])
    assert tried[0] < tried[-1] == f"step_{step:06d}"
    assert len(completions(folder / "newest")) == 3 * results(folder / "newest")["benchmarks"]["problems"]["problems"]
    assert training.is_alive()
    training.terminate()
    training.join(60)
    assert training.exitcode == 0, (folder / "log").read_text()
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > step
