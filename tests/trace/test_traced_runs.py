"""Traced steps of whole runs, on several layouts, in process and with rollout servers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_aapo import load_config
from nemo_aapo.errors import ConfigError
from tests.servers import Servers, wait_until_ready
from tests.trace.test_spans import assert_perfetto
from tests.training_runs import make_input, metrics, run, settings

STEPS = (2, 3, 4)
STEP = STEPS[0]
TRACED = (f"trace.steps={list(STEPS)}", f"trainer.max_steps={STEPS[-1]}", "checkpoint.save_interval=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_input(tmp_path_factory.mktemp("traced"))


def read(run_dir: Path, number: int = STEP):
    trace = json.loads((run_dir / "trace" / f"step_{number:06d}.json").read_text())
    assert_perfetto(trace["traceEvents"])
    return trace


def processes(trace):
    """Name of a process -> its spans."""
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    found = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[names[event["pid"]]].append(event)
    return found


def inside(events, outer):
    """The spans of the same track within another one."""
    start, end = outer["ts"], outer["ts"] + outer["dur"]
    return [
        e
        for e in events
        if e is not outer and e["tid"] == outer["tid"] and start <= e["ts"] and e["ts"] + e["dur"] <= end
    ]


def assert_phases_tell_the_step(run_dir, ranks):
    """On each rank phases cover a step, and on rank 0 they are what the metrics say."""
    records = {line["step"]: line for line in metrics(run_dir, timeless=False) if "loss" in line}
    covered = [[] for _ in range(ranks)]
    for number in STEPS:
        trace = read(run_dir, number)
        for rank in range(ranks):
            own = processes(trace)[f"rank {rank}"]
            (step,) = [e for e in own if e["cat"] == "step"]
            within = inside(own, step)
            outermost = [e for e in within if e["cat"] == "phase" and not any(e in inside(within, o) for o in within)]
            covered[rank].append(sum(e["dur"] for e in outermost) / step["dur"])
            if rank:
                continue
            for name in (f"step {number}", "rollout", "reward", "reference", "train", "refit"):
                told = sum(e["dur"] for e in [step, *within] if e["name"] == name) / 1e6
                assert told == pytest.approx(records[number][f"time/{name.split()[0]}"], rel=1e-6, abs=1e-6), name
    # what no phase covers is missing in each step, and what holds a rank up between two phases in one or the other
    assert min(map(max, covered)) >= 0.95, covered


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "collectives"),
    [
        ({"world": 2, "tp": 2}, {"all_reduce", "broadcast"}),
        ({"world": 2, "pp": 2}, {"send", "recv", "broadcast"}),
        ({"world": 2}, {"all_gather", "all_to_all"}),
    ],
    ids=["TP2", "PP2", "DP2"],
)
def test_a_traced_step_shows_phases_micro_batches_and_collectives_of_every_rank(ranks, folder, layout, collectives):
    world, run_dir = layout["world"], folder / "-".join(f"{k}{v}" for k, v in layout.items())
    words = settings(folder, run_dir, *TRACED, "trainer.val_check_interval=0", **layout)
    assert ranks.run(run, words, world=world, tp=None) == [0] * world
    assert_phases_tell_the_step(run_dir, world)
    trace = read(run_dir)
    for rank in range(world):
        own = processes(trace)[f"rank {rank}"]
        kinds = Counter(e["cat"] for e in own)
        assert collectives <= {e["name"] for e in own if e["cat"] == "collective"}
        assert kinds["wait"]
        passes = [e["name"] for e in own if e["cat"] == "micro-batch"]
        assert passes.count("forward 1") == passes.count("backward 1") > 0
    rows = [e["args"] for e in trace["traceEvents"] if e["ph"] == "C" and e["name"] == "rows"]
    assert rows
    assert {"live", "waiting"} == set(rows[0])
    assert all(row["live"] >= 0 for row in rows)
    assert trace["otherData"] == {**trace["otherData"], "ranks": world, "machines": 1, "left_out": 0}


@pytest.mark.ranks
def test_rewards_in_workers_servers_and_a_refit_have_tracks_of_their_own(ranks, folder):
    servers = Servers(folder / "servers")
    rewards = ("rewards=[{name: exact, weight: 1.0}]", "validation.reward=exact", "reward_runner.workers=2")
    try:
        servers.start(0, settings(folder, folder / "none"))
        wait_until_ready(servers.directory, 0, timeout_s=120)
        words = ("rollout.engine=remote", f"rollout.remote.directory={servers.directory}", "rollout.remote.wait_s=60")
        words = settings(folder, folder / "remote", *words, *rewards, *TRACED, world=2)
        assert ranks.run(run, words, None, False, world=2, tp=None) == [0, 0]
    finally:
        servers.close()
    assert_phases_tell_the_step(folder / "remote", 2)
    trace = read(folder / "remote")
    tracks = processes(trace)
    for rank in range(2):
        scores = [e for e in tracks[f"reward workers of rank {rank}"] if e["name"] == "score"]
        assert len(scores) >= 8, "two prompts of four completions each, and the validation's"
    server = tracks["rollout server 0"]
    assert {"request", "generate", "refit to version 2"} <= {e["name"] for e in server}
    (step,) = [e for e in tracks["rank 0"] if e["cat"] == "step"]
    generated = [e for e in server if e["name"] == "generate" and e["ts"] < step["ts"] + step["dur"]]
    for e in generated:  # the server's clock is this machine's: alignment must not have moved it by much
        requests = [r for r in server if r["name"] == "request" and r["ts"] - 5e3 <= e["ts"] <= r["ts"] + r["dur"]]
        assert requests
    counters = [e for e in trace["traceEvents"] if e["ph"] == "C" and e["name"] == "rows"]
    assert counters, "rows of the server's engine"


@pytest.mark.unit
@pytest.mark.parametrize("steps", ["[0]", "[-3]", "[two]", "two", "[7]", "[1.5]", "{a: 1}", f"{list(range(1, 200))}"])
def test_steps_that_can_never_be_traced_are_refused_by_name(folder, tmp_path, steps):
    limit = "trainer.max_steps=1000" if "199" in steps else "trainer.max_steps=6"
    with pytest.raises(ConfigError, match=r"trace\.steps"):
        load_config(settings(folder, tmp_path, limit, f"trace.steps={steps}"))
