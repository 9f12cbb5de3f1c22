"""The quickstart with experts: it learns, and it is the same run on one rank and on two that share the experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.quickstart.base_model import MixtureRecipe, make_base_model
from tests.training_runs import metrics, run

SHORT = (
    "trainer.max_steps=6",
    "trainer.val_check_interval=0",
    "trainer.distributed_timeout_s=60",
    "checkpoint.save_interval=100",
    "exp_manager.create_tensorboard_logger=false",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that gets a quarter of the sums right: enough to reinforce, in a third of the recipe's time."""
    directory = tmp_path_factory.mktemp("moe") / "base"
    make_base_model(directory, replace(MixtureRecipe(), clean_steps=200, noisy_steps=0), force=False, log=print)
    return directory


def words(base, run_dir, *more: str) -> list[str]:
    data = [f"data.{name}={base}/data/{name}.jsonl" for name in ("train", "validation")]
    return ["experiment=quickstart_moe", f"model.path={base}", *data, f"run.dir={run_dir}", *SHORT, *more]


def test_it_learns_and_two_ranks_with_half_of_the_experts_each_learn_the_same(ranks, base, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    ranks.run(run, words(base, alone), None, False, tp=None)
    two = ("trainer.devices=2", "model.expert_model_parallel_size=2")
    ranks.run(run, words(base, shared, *two), None, False, world=2, tp=None)
    one, both = metrics(alone), metrics(shared)
    assert [line["step"] for line in one] == [line["step"] for line in both] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(one, both, strict=True):
        for key in ("reward/mean", "reward/std", "completion_length/mean", "advantage/abs_mean"):
            assert other[key] == pytest.approx(line[key], abs=1e-12), (line["step"], key)
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-6, abs=1e-7), line["step"]
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5), line["step"]
        assert line["router/replay_disagreement"] == 0  # engine and learner chose alike
    rewards = [line["reward/mean"] for line in one]
    assert sum(rewards[3:]) > sum(rewards[:3]) + 0.05
