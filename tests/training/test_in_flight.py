"""Runs whose servers take new weights between two tokens: bounded staleness, and a kill after which all is repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.servers import Servers, wait_until_ready
from tests.training_runs import make_input, metrics, run, settings

LAG, STEPS = 2, 8
WORDS = (
    f"rollout.max_lag={LAG}",
    "algorithm.importance_weight_cap=2.0",
    "rollout.max_new_tokens=48",  # and few rows, so that some sequence always is in the midst of its tokens
    "rollout.max_concurrent_tokens=512",
    "max_tokens_per_microbatch=256",
    "rollout.remote.servers=2",
    "rollout.keep_groups=all",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=4",
    "checkpoint.save_interval=3",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("in_flight"))


@pytest.fixture(scope="module")
def servers(folder):
    started = Servers(folder / "servers")
    for index in (0, 1):
        started.start(index, settings(folder, folder / "none", *WORDS))
    for index in (0, 1):
        wait_until_ready(started.directory, index, timeout_s=120)
    yield started
    started.close()


def words(folder, run_dir, servers, *more, **layout):
    remote = ("rollout.engine=remote", f"rollout.remote.directory={servers.directory}", "rollout.remote.wait_s=60")
    return settings(folder, run_dir, *remote, *WORDS, *more, **layout)


def steps_of(run_dir):
    return [line for line in metrics(run_dir) if "loss" in line]


def rows_of(run_dir):
    """By step, what its completions were: prompt, text, versions."""
    found = {}
    for step in range(1, STEPS + 1):
        lines = (run_dir / "rollouts" / f"train_{step:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[step] = [(r["prompt_id"], r["completion"], r["policy_version"], r.get("versions")) for r in rows]
    return found


def assert_bounded(run_dir):
    steps, rows = steps_of(run_dir), rows_of(run_dir)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(0 <= line["rollout/lag"] <= line["rollout/lag_max"] <= LAG for line in steps)
    assert max(line["rollout/lag_max"] for line in steps) == LAG
    assert all(np.isfinite(line["importance_weight/mean"]) for line in steps)
    for line in steps:
        mixed = [versions for *_, versions in rows[line["step"]] if versions]
        assert line["rollout/mixed_versions"] == len(mixed) / 16
        assert all(first < last for (first, _), *_, (last, _) in mixed)
    assert sum(line["rollout/mixed_versions"] for line in steps) > 0
    # each prompt as often as in order: none is lost, whatever its completions' length
    prompts = sorted(prompt for of in rows.values() for prompt, *_ in of)
    assert len(prompts) == STEPS * 16
    assert {prompts.count(prompt) for prompt in set(prompts)} <= {12, 16}  # 8 steps of 4 prompts out of 10


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_of_several_versions_reach_the_learner_within_the_bound(ranks, folder, servers, recompute):
    run_dir = folder / f"recompute_{recompute}"
    more = f"rollout.recompute_kv={str(recompute).lower()}"
    assert ranks.run(run, words(folder, run_dir, servers, more), tp=None) == [0]
    assert_bounded(run_dir)
    assert steps_of(run_dir)[0]["parity/mult_prob_error"] < 1.0001
