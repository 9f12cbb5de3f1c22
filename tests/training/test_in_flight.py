"""Runs whose servers take new weights between two tokens: bounded staleness, and a kill after which all is repeated."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from nemo_aapo.launch.local import free_port, rank_environments
from tests.forked import forking
from tests.servers import Servers, wait_until_ready
from tests.training_runs import killed_after, make_input, metrics, run, settings

LAG, STEPS = 2, 8
WORDS = (
    f"rollout.max_lag={LAG}",
    "algorithm.importance_weight_cap=2.0",
    "rollout.max_new_tokens=48",  # and two rows, so that sequences are in the midst of their tokens when weights come
    "rollout.max_concurrent_tokens=128",
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
        started.start(index, settings(folder, folder / "none", "rollout.engine=remote", *WORDS))
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


def test_data_parallel_ranks_agree_on_what_each_step_takes(ranks, folder, servers):
    """Each asks the servers for prompts of its own, and is dealt its part of what any of them has in hand."""
    run_dir = folder / "two_ranks"
    assert ranks.run(run, words(folder, run_dir, servers, world=2), world=2, tp=None) == [0, 0]
    assert_bounded(run_dir)


def _alone(environment, words, log):
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    run(words)


def test_a_killed_run_makes_the_steps_behind_its_checkpoint_again_as_they_were(ranks, folder, servers):
    """Killed in its seventh step, when the last checkpoint is that of the third or sixth."""
    run_dir = folder / "killed"
    own = words(folder, run_dir, servers, "trainer.val_check_interval=0", "checkpoint.save_interval=4")
    log = folder / "killed.log"
    process = forking().Process(
        target=_alone, args=(rank_environments({}, 1, free_port())[0], own, str(log)), daemon=True
    )
    process.start()
    end = time.monotonic() + 200
    while len(metrics(run_dir)) < 7:
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < end, "no seventh step"
        time.sleep(0.005)
    process.kill()
    process.join(10)
    before = steps_of(run_dir)
    kept = {
        step: (run_dir / "rollouts" / f"train_{step:06d}.jsonl").read_text() for step in (5, 6)
    }  # of the last one perhaps not yet
    newest = max((run_dir / "checkpoints").iterdir())
    assert newest.name == "step_000004"
    assert ranks.run(run, own, tp=None) == [0]
    assert_bounded(run_dir)
    steps = steps_of(run_dir)
    assert steps[: len(before)] == before  # to the bit, the steps behind the checkpoint too
    for step, text in kept.items():
        again = (run_dir / "rollouts" / f"train_{step:06d}.jsonl").read_text()
        assert untimed(again) == untimed(text)
    assert not (run_dir / "bank").exists()


def untimed(lines):
    return [{**json.loads(line), "time": None} for line in lines.splitlines()]


def test_a_server_that_dies_in_the_midst_costs_its_tokens_and_nothing_else(ranks, folder, servers):
    """The last test: one server is left. What the other one had begun is drawn again, by the newest weights."""
    run_dir = folder / "one_dies"
    with killed_after(3, run_dir, servers.processes[1].pid):
        assert ranks.run(run, words(folder, run_dir, servers), tp=None) == [0]
    assert_bounded(run_dir)
