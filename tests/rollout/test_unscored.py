"""What a failed scoring costs a run: its own completion. What rewards that fail for everything cost: the run."""

from __future__ import annotations

import contextlib
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.algorithms.advantage import group_advantage, margin, margin_metrics
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import Interrupted, RewardError
from nemo_aapo.evaluation.validation import Validator
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.rollout.reference import ReferenceRewards
from nemo_aapo.rollout.scored import ScoredRollout
from nemo_aapo.rollout.unscored import IN_A_ROW, TOTAL, ScoringWatch, Tally
from nemo_aapo.run.step_metrics import GroupNumbers, step_metrics
from nemo_aapo.types import Completion, Group, Prompt, SamplingSpec
from tests.pool import RankError
from tests.rollout.reference_runs import Quiet, counted, rows
from tests.training_runs import Parity, make_input, metrics, settings

SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=1", "checkpoint.save_interval=9", "export_hf_model=false"]


def tally(completions, **scored):
    return Tally(completions, scored | {TOTAL: min(scored.values())}, "a: Boom (mine.py:3)")


def test_a_reward_that_never_worked_ends_the_first_rollout_and_the_sum_ends_it_after_many_in_a_row():
    watch = ScoringWatch()
    watch.check(Tally(), "step 1")  # a checkpoint held its rollouts: nothing is known
    watch.check(tally(8, a=1, b=8), "step 2")
    watch.check(tally(IN_A_ROW - 1, a=0, b=0), "step 3")
    watch.check(tally(8, a=1, b=1) + tally(8, a=0, b=0), "step 4")  # on two ranks
    watch.check(tally(1, a=0, b=1), "step 5")
    watch.in_a_row = IN_A_ROW - 1
    with pytest.raises(RewardError, match=f"step 6: not one of {IN_A_ROW} completions .* by {TOTAL}.* Boom"):
        watch.check(tally(1, a=0, b=0), "step 6")
    with pytest.raises(RewardError, match=r"step 1: not one of 8 completions .* by b; .*reward_runner\.timeout_s"):
        ScoringWatch().check(tally(8, a=7, b=0), "step 1")
    ScoringWatch(proven=True).check(tally(8, a=0, b=0), "what an earlier process has left over")
    with pytest.raises(RewardError, match="validation"):
        ScoringWatch(needed="b", proven=True).check(tally(IN_A_ROW, a=1, b=0), "the validation")


def test_a_tally_counts_by_reward_and_says_why_the_first_had_no_value():
    good = SimpleNamespace(score=1.0, parts={"a": 1.0, "b": 0.0}, failure=None, detail="")
    reports = SimpleNamespace(score=1.0, parts={"a": 1.0, "b": math.nan}, failure=None, detail="b: Boom")
    lost = SimpleNamespace(score=math.nan, parts={"a": math.nan, "b": math.nan}, failure="timeout", detail="late")
    found = Tally.of([good, reports]) + Tally.of([]) + Tally.of([lost])
    assert found == Tally(3, {"a": 2, "b": 1, TOTAL: 2}, "b: Boom")


def test_metrics_of_a_step_are_those_of_what_was_scored():
    nan = math.nan

    def group(rewards, advantages, references):
        parts = {"a": np.array(rewards), "b": np.array([1.0, nan])}
        lengths, none = np.array([3, 5]), np.zeros(2, bool)
        drawn = np.array([9, 16]), np.array([3, 3]), np.array([False, True])  # by version 3, and the last token by 4
        values = (np.array(rewards), parts, np.array(references), np.array(advantages))
        return GroupNumbers(*values, lengths, none, np.isnan(rewards), *drawn, 7)

    found = step_metrics([group([1.0, nan], [0.0, nan], [nan, 0.5]), group([nan, nan], [nan, nan], [nan, nan])], 5, "a")
    expected = {"reward/mean": 1.0, "reward/std": 0.0, "reward/failed_fraction": 0.75, "reward/a": 1.0, "reward/b": 1.0}
    expected |= {"advantage/mean": 0.0, "groups/zero_std": 1.0, "groups/zero_advantage": 1.0, "groups/failed": 0.5}
    expected |= {"groups/all_right": 1.0, "groups/all_wrong": 0.0, "reference_reward/mean": 0.5}
    expected |= {"completion_length/mean": 4.0}
    expected |= {"rollout/lag": (2 * 3 + 2 * 4 + 1) / 8, "rollout/lag_max": 2.0, "rollout/mixed_versions": 0.5}
    assert {key: found[key] for key in expected} == expected
    nothing = step_metrics([group([nan, nan], [nan, nan], [nan, nan])], 0, "a")
    assert all(math.isnan(nothing[key]) for key in ("reward/mean", "reward/std", "groups/zero_std", "advantage/mean"))


def test_the_margins_metrics_are_those_of_what_was_scored():
    rewards = np.array([[1.0, 1.0], [1.0, math.nan]])
    advantages = augmented(rewards, np.array([[0.0, 0.0], [1.0, 1.0]]))
    found = margin_metrics(group_advantage(rewards, True), advantages, low=-0.2, high=0.28)
    expected = {"margin/mean": 0.28 * 2 / 3, "margin/abs_mean": 0.28 * 2 / 3, "margin/at_bound": 2 / 3}
    assert found == pytest.approx({"advantage/group_abs_mean": 0.0, **expected})
    nothing = np.full((1, 2), math.nan)
    assert math.isnan(margin_metrics(nothing, nothing, low=-0.2, high=0.28)["margin/mean"])


def augmented(rewards, references):
    return group_advantage(rewards, True) + margin(rewards, references, -0.2, 0.28, "expected")


def test_rollouts_that_could_not_be_scored_at_all_are_not_kept_for_a_resumed_run():
    from nemo_aapo.rollout.in_order import InOrderPipeline

    trainer = SimpleNamespace(max_steps=2)
    config = SimpleNamespace(
        rollout=SimpleNamespace(async_depth=1, oversample=None), prompts_per_step=1, trainer=trainer
    )
    sampler = SimpleNamespace(step=0, knows=lambda step: True)
    parts = {"collector": None, "sampling": None, "prompts": [], "sampler": sampler, "reference": None}
    pipeline = InOrderPipeline(config=config, policy=SimpleNamespace(version=0), **parts)
    pipeline._ahead = {0: ScoredRollout([], [], tally(8, a=0)), 1: ScoredRollout([], [], tally(8, a=1))}
    assert pipeline.pending_files() == {}
    del pipeline._ahead[0]  # never begun, or lost: a run that went on from here would draw it with later weights
    with pytest.raises(Interrupted, match="not all begun"):
        pipeline.pending_files()


class BrokenOff:
    """A collector that a stop breaks off when one completion of all prompts has ended, which could not be scored."""

    tally = tally(1, a=0)

    def collect(self, prompts, sampling, seeds, watch, **_):
        assert watch(1)
        ended = Completion(np.array([3], np.int32), np.zeros(1, np.float32), "stop", 0)
        nothing = np.array([math.nan])
        rows = [((ended,), nothing, {"a": nothing}), *[((), nothing[:0], {})] * (len(prompts) - 1)]
        return [Group(p, c, (), r, parts, np.isnan(r)) for p, (c, r, parts) in zip(prompts, rows, strict=True)]


def test_the_few_that_ended_before_a_stop_are_not_taken_for_a_whole_rollout_that_failed(monkeypatch):
    monkeypatch.setattr(parallel, "any_rank", lambda *flags: list(flags))
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "broadcast_from_first_rank", lambda value: value)
    for name, value in (("data_parallel_size", 1), ("rank", 0)):
        monkeypatch.setattr(parallel, name, lambda value=value: value)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    prompts = [Prompt(name, np.array([5], np.int32), "", "", "") for name in "abc"]
    spec = SamplingSpec(0.0, 4, (2,))
    with pytest.raises(Interrupted):
        Validator(BrokenOff(), prompts, "a", spec, spec, samples=0, seed=1, stop=lambda: True).run()
    parts = {"sampling": spec, "samples": 2, "seed": 1, "key": None, "store": None, "online": False}
    reference = ReferenceRewards(collector=BrokenOff(), **parts)
    assert not reference.prepare(prompts, contextlib.nullcontext, stop_requested=lambda: True)


# ---------------------------------------------------------------- whole runs


class Shaky(Parity):
    """Can't score what its tokens decide, as a reward's own code may, or nothing at all."""

    works = True

    def __call__(self, prompt, text, completion):
        total = int(completion.token_ids.sum())
        if not self.works or total % 5 == 1:
            raise RuntimeError(f"{total} is too much")
        return super().__call__(prompt, text, completion)


class Broken(Shaky):
    works = False


class Lost(RewardRunner):
    """One whose workers can't be started again, on the second rank."""

    def collect(self, indices=None, timeout_s=None):
        if os.environ["RANK"] == "1":
            raise RewardError("a reward worker can't be started")
        return super().collect(indices, timeout_s)


def run(overrides, reward=Shaky, runner=RewardRunner):
    from nemo_aapo import load_config, train

    return train(load_config(overrides), rewards=runner([(reward(), 1.0)], workers=0, timeout_s=10.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("unscored"))


def test_a_run_with_failed_scorings_is_the_same_on_one_rank_and_on_two(ranks, folder):
    lines, stored = [], []
    for world in (1, 2):
        directory = folder / f"shaky{world}"
        ranks.run(run, settings(folder, directory, *SHORT, "data.sampling=hard", world=world), world=world, tp=None)
        lines.append(metrics(directory))
        stored.append(rows(directory / "reference_rewards.sqlite"))
    steps = [line for line in lines[0] if "loss" in line]
    assert len(steps) == 2
    assert all(0 < step["reward/failed_fraction"] < 1 and math.isfinite(step["loss"]) for step in steps)
    assert all(0 < line["validation/failed_fraction"] < 1 for line in lines[0] if "loss" not in line)
    samples = {prompt: [k for _, p, k, _ in stored[0] if p == prompt] for _, prompt, *_ in stored[0]}
    assert any(found != list(range(len(found))) for found in samples.values())  # a hole where scoring failed
    assert stored[0] == stored[1]
    for line in lines[0] + lines[1]:
        for key in ("microbatches", "padding_fraction", "shared_prompt_fraction"):  # what the layout does decide
            line.pop(key, None)
    for one, other in zip(*lines, strict=True):
        assert one == {key: pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True) for key, value in other.items()}


def test_a_second_process_samples_again_what_the_first_could_not_score(ranks, folder):
    words = settings(folder, folder / "again", *SHORT)
    ((filled, unscored),) = ranks.run(prepared, words, tp=None)
    assert filled[0] > 0
    assert unscored > 0
    ((again, still),) = ranks.run(prepared, words, tp=None)
    assert 0 < again[0] < filled[0]  # only those
    assert still == unscored  # they are the same completions, and the reward has not changed
    assert len(rows(folder / "again" / "reference_rewards.sqlite")) == 10 * 4 - unscored


def prepared(overrides):
    """Tokens that each ``generate`` of a filling drew, and how many rewards it could not get."""
    from nemo_aapo import load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.training.build import build_training, initialize

    config = load_config(overrides)
    initialize(config)
    with contextlib.ExitStack() as stack:
        rewards = RewardRunner([(Shaky(), 1.0)], workers=0, timeout_s=10.0)
        trainer = build_training(resolve(config, 1, given=("rewards",)), reporter=Quiet(), stack=stack, rewards=rewards)
        drawn, reference = counted(trainer), trainer.rollouts.reference
        assert reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served)
        assert reference.has(trainer.rollouts.data)  # this process goes on without them
        return drawn, reference.unscored


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("the validation", []),
        ("the reference rewards", ["trainer.val_check_interval=0"]),
        ("step 1", ["trainer.val_check_interval=0", "algorithm=gpg"]),
    ],
)
def test_a_reward_that_fails_for_everything_ends_the_run_on_all_ranks_with_its_message(ranks, folder, where, more):
    directory = folder / where.replace(" ", "_")
    with pytest.raises(RankError) as raised:
        ranks.run(run, settings(folder, directory, *SHORT, *more, world=2), Broken, world=2, tp=None)
    said = str(raised.value)
    assert said.count(f"RewardError: {where}: not one of ") == 2
    assert "parity: RuntimeError: " in said
    assert "is too much" in said
    assert not (directory / "finished").exists()
    assert not (directory / "metrics.jsonl").read_text()


def test_a_rank_that_cannot_score_at_all_ends_the_run_on_all_ranks_instead_of_keeping_them_waiting(ranks, folder):
    with pytest.raises(RankError) as raised:
        ranks.run(run, settings(folder, folder / "lost", *SHORT, world=2), Parity, Lost, world=2, tp=None)
    assert str(raised.value).count("RewardError: a reward worker can't be started") == 2
