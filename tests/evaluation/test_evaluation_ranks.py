"""Whole evaluations on worker ranks: layouts, interruption, more samples, checkpoints of training, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from nemo_aapo.engines.remote.directory import Claim, ServerRecord, publish
from nemo_aapo.errors import ConfigError
from tests.pool import RankError
from tests.servers import Servers, ask, wait_until_ready
from tests.training_runs import make_input, run, settings

PROBLEMS = 7


def even(prompt, completion, answer, **info):
    """A reward that a random model earns now and then."""
    return float(info["num_tokens"] % 2 == 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model, and a file of problems with levels."""
    folder = make_input(tmp_path_factory.mktemp("evaluation"))
    rows = [{"question": f"{n}+1=", "answer": str(n + 1), "level": n % 2} for n in range(10, 10 + PROBLEMS)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"run.dir={folder / name}",
        f"model.path={folder / 'model'}",
        "benchmarks=[problems]",
        f"+sources.problems={folder / 'problems.jsonl'}",
        "fields.level=level",
        "prompt_template=question",
        "max_prompt_tokens=16",
        "samples=3",
        "sampling.temperature=1.0",
        "sampling.max_new_tokens=8",
        "max_concurrent_tokens=512",
        "problems_per_batch=2",
        "rewards=[{name: custom, function: 'tests.evaluation.test_evaluation_ranks:even'}]",
        "trainer.devices=1",
        "trainer.distributed_timeout_s=60",
        *more,
    ]


def evaluate(
    overrides: list[str],
    at_batch: int | None = None,
    pid: int | None = None,
    number: int = 15,
    stop_file: Path | None = None,
) -> int:
    """One rank of a whole evaluation; in a batch a process gets a signal, as if a scheduler ended this one.

    Or the stop file is made, where one is named.
    """
    from nemo_aapo.jobs import evaluate as evaluation_job
    from nemo_aapo.prepare.evaluation import prepare_evaluation

    batches, measure = [], evaluation_job.measure

    def counted(*arguments):
        batches.append(1)
        if len(batches) == at_batch and stop_file:
            stop_file.touch()
        elif len(batches) == at_batch:
            os.kill(pid or os.getpid(), number)
        return measure(*arguments)

    evaluation_job.measure = counted
    try:
        return evaluation_job.evaluate(prepare_evaluation(overrides))
    finally:
        evaluation_job.measure = measure


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def completions(directory: Path) -> list[str]:
    """Lines in an order of their own: batches are cut differently by interruption."""
    return sorted((directory / "completions" / "problems.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(ranks, folder) -> Path:
    """An evaluation without interruption, on one rank."""
    assert ranks.run(evaluate, words(folder, "whole"), tp=None) == [0]
    return folder / "whole"


def test_an_evaluation_leaves_completions_figures_and_tables(whole):
    figures = results(whole)["benchmarks"]["problems"]
    rows = [json.loads(line) for line in completions(whole)]
    assert len(rows) == 3 * PROBLEMS
    assert {(row["sample"], row["level"]) for row in rows} == {(k, level) for k in range(3) for level in "01"}
    assert all(row["correct"] == (row["tokens"] % 2 == 0) for row in rows)
    assert (figures["problems"], figures["samples"]) == (PROBLEMS, 3)
    assert figures["avg@3"]["value"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows))
    assert 0 < figures["avg@3"]["value"] < 1
    assert figures["avg@3"]["value"] <= figures["pass@2"]["value"] <= figures["pass@3"]["value"]
    assert [figures["by_level"][level]["problems"] for level in "01"] == [4, 3]
    table = (whole / "tables.md").read_text()
    assert "| problems " in table
    assert "maj@k" in table
    assert (whole / "finished").exists()


def test_a_mixture_of_experts_draws_the_same_wherever_its_experts_are(ranks, folder, tiny_models):
    found = {}
    for name, tp in (("one", 1), ("tensor", 2), ("data", 1)):  # experts on tensor ranks, and on data-parallel ones
        world = 1 if name == "one" else 2
        layout = [f"trainer.devices={world}", f"model.tensor_model_parallel_size={tp}"]
        more = [f"model.path={tiny_models['qwen3_moe']}", *layout, f"model.expert_model_parallel_size={world}"]
        assert set(ranks.run(evaluate, words(folder, f"experts_{name}", *more), world=world, tp=None)) == {0}
        found[name] = completions(folder / f"experts_{name}")
    assert len(found["one"]) == 3 * PROBLEMS
    assert found["tensor"] == found["data"] == found["one"]


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 1), (4, 2, 2)])
def test_every_layout_draws_the_same_completions(ranks, folder, whole, world, tp, pp):
    name = f"layout{tp}{pp}"
    layout = [f"model.tensor_model_parallel_size={tp}", f"model.pipeline_model_parallel_size={pp}"]
    done = ranks.run(evaluate, words(folder, name, f"trainer.devices={world}", *layout), tp=None, world=world)
    assert done == [0] * world
    assert completions(folder / name) == completions(whole)
    assert results(folder / name) == results(whole)


@pytest.mark.parametrize("by", ["signal", "file"])
def test_interrupted_it_goes_on_to_the_same_result(ranks, folder, whole, by):
    directory = folder / f"interrupted_by_{by}"
    stop_file = directory / "stop" if by == "file" else None
    assert ranks.run(evaluate, words(folder, directory.name), 2, None, 15, stop_file, tp=None) == [0]
    assert len(completions(directory)) == 2 * 2 * 3  # the batch at hand was kept
    assert not (directory / "finished").exists()
    file = directory / "completions" / "problems.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # a crash in the middle of a line
    assert ranks.run(evaluate, words(folder, directory.name, "problems_per_batch=3"), tp=None) == [0]
    assert completions(directory) == completions(whole)
    assert results(directory) == results(whole)


def test_more_samples_are_added_to_those_that_are_there(ranks, folder, whole):
    assert ranks.run(evaluate, words(folder, "grown", "samples=1"), tp=None) == [0]
    assert "avg@1" in results(folder / "grown")["benchmarks"]["problems"]
    assert ranks.run(evaluate, words(folder, "grown"), tp=None) == [0]
    assert completions(folder / "grown") == completions(whole)
    assert results(folder / "grown") == results(whole)
    assert ranks.run(evaluate, words(folder, "grown", "samples=1"), tp=None) == [0]  # and fewer can be asked for again
    assert results(folder / "grown")["benchmarks"]["problems"]["samples"] == 1


@pytest.fixture(scope="module")
def trained(ranks, folder) -> Path:
    """A run of two steps, and what its checkpoint measures, ``by_run``."""
    training = settings(folder, folder / "run", "trainer.max_steps=2", world=2, tp=2)
    assert ranks.run(run, training, tp=None, world=2) == [0, 0]
    assert ranks.run(evaluate, words(folder, "by_run", f"model.path={folder / 'run'}"), tp=None) == [0]
    return folder / "run"


def test_a_checkpoint_of_training_measures_as_the_model_that_it_exports(ranks, folder, whole, trained):
    for name, model in (("by_step", "checkpoints/step_000002"), ("by_export", "hf_model")):
        assert ranks.run(evaluate, words(folder, name, f"model.path={trained / model}"), tp=None) == [0]
        assert completions(folder / name) == completions(folder / "by_run")
    assert completions(folder / "by_run") != completions(whole)
    assert "(step 2)" in results(folder / "by_run")["model"]


# ---------------------------------------------------------------- through rollout servers


@pytest.fixture(scope="module")
def servers(folder):
    """Two servers of the base model."""
    started = Servers(folder / "servers")
    for index in (0, 1):
        started.start(index, settings(folder, folder / "none"))
    for index in (0, 1):
        wait_until_ready(started.directory, index, timeout_s=120)
    yield started
    started.close()


def on_servers(folder, name, servers, *more):
    there = f"rollout.remote.directory={servers.directory}"
    return words(folder, name, "rollout.engine=remote", there, "rollout.remote.wait_s=20", *more)


def served(servers) -> list[dict]:
    return [ask(servers.directory, index, "/v1/ready")[1] for index in (0, 1)]


def test_servers_draw_the_same_completions_of_a_model_and_of_a_checkpoint(ranks, folder, whole, trained, servers):
    for name, model, world, like in (("s_hf", folder / "model", 2, "whole"), ("s_run", trained, 1, "by_run")):
        more = (f"model.path={model}", f"trainer.devices={world}", "rollout.remote.servers=2")
        assert ranks.run(evaluate, on_servers(folder, name, servers, *more), tp=None, world=world)[0] == 0
        assert completions(folder / name) == completions(folder / like)
        assert results(folder / name) == results(folder / like)
        assert [of["policy_version"] for of in served(servers)] == [1, 1]
        assert list((servers.directory / "weights").iterdir()) == []


def test_no_weights_of_another_client_are_replaced_and_what_servers_cannot_do_is_said(ranks, folder, servers):
    before = served(servers)
    training = Claim(servers.directory, "results/training")
    training.take()
    with pytest.raises(RankError, match=r"ConfigError: .*its servers are in use by process \d+ .*results/training"):
        ranks.run(evaluate, on_servers(folder, "busy", servers), tp=None)
    training.drop()
    other = shutil.copytree(folder / "model", folder / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace("1e-06", "1e-05"))
    of_another = on_servers(folder, "other_model", servers, f"model.path={other}", "rollout.remote.wait_s=1")
    with pytest.raises(RankError, match=r"(?s)RunError: after 1 s .*rms_norm_eps=1e-05 \(here 1e-06\)"):
        ranks.run(evaluate, of_another, tp=None)
    assert served(servers) == before
    publish(servers.directory, ServerRecord(7, "http://127.0.0.1:1", 1, "gone", "bf16"))
    with pytest.raises(RankError, match=r"precision\.name=fp32: rollout server 7 .* computes in bf16\. Ask for that"):
        ranks.run(evaluate, on_servers(folder, "bf16", servers), tp=None)
    (servers.directory / "server_7.json").unlink()
    assert served(servers) == before  # and not the weights of an evaluation that was refused then
    alone = words(folder, "alone", "rollout.engine=remote", "rollout.remote.wait_s=1")
    with pytest.raises(RankError, match=r"(?s)RunError: after 1 s .*none has announced itself in"):
        ranks.run(evaluate, alone, tp=None)


def test_a_server_that_dies_in_an_evaluation_changes_nothing_of_it(ranks, folder, whole, servers):
    more = on_servers(folder, "dead", servers, "rollout.remote.servers=2")
    assert ranks.run(evaluate, more, 2, servers.processes[0].pid, signal.SIGKILL, tp=None) == [0]
    assert completions(folder / "dead") == completions(whole)


def test_a_run_without_a_checkpoint_is_a_refusal_on_all_ranks(ranks, folder):
    training = settings(folder, folder / "young", "trainer.max_steps=1")
    assert ranks.run(run, training, tp=None) == [0]
    shutil.rmtree(folder / "young" / "checkpoints" / "step_000001")
    with pytest.raises(RankError, match=f"{ConfigError.__name__}: .*none was saved yet"):
        ranks.run(
            evaluate, words(folder, "none", f"model.path={folder / 'young'}", "trainer.devices=2"), tp=None, world=2
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["seed=5"], "seed: 1234 there, 5 now"),
        (["sampling.top_p=0.5"], "holds another evaluation"),
        (["rewards=[{name: integer}]"], '"name": "integer"} now'),
    ],
)
def test_another_evaluation_is_not_mixed_with_what_is_there(ranks, folder, whole, changes, said):
    before = completions(whole)
    with pytest.raises(RankError, match=ConfigError.__name__) as refusal:
        ranks.run(evaluate, words(folder, "whole", *changes), tp=None)
    assert said in str(refusal.value)
    assert completions(whole) == before


def test_gold_answers_that_no_reward_takes_are_an_error_or_are_counted_as_wrong(ranks, folder):
    odd = folder / "odd.jsonl"
    odd.write_text('{"question": "1+1=", "answer": "2"}\n{"question": "why?", "answer": "because"}\n')
    more = [f"+sources.odd={odd}", "benchmarks=[odd]", "fields.level=null", "rewards=[{name: integer}]"]
    with pytest.raises(RankError, match="1 of 2 gold answers can't be used") as refusal:
        ranks.run(evaluate, words(folder, "odd", *more), tp=None)
    assert "on_bad_answer=wrong" in str(refusal.value)
    assert ranks.run(evaluate, words(folder, "odd", *more, "on_bad_answer=wrong"), tp=None) == [0]
    figures = results(folder / "odd")["benchmarks"]["odd"]
    assert (figures["problems"], figures["avg@3"]["value"]) == (2, 0.0)


def shaky(prompt, completion, answer, **info):
    """A reward that can't judge some completions, or none of the question that asks for it."""
    if "broken" in answer or info["num_tokens"] % 4 == 1:
        raise RuntimeError("no verdict")
    return float(info["num_tokens"] % 2 == 0)


def test_completions_that_cannot_be_judged_are_kept_as_such_and_all_of_them_end_it_with_the_message(ranks, folder):
    reward = "rewards=[{name: custom, function: 'tests.evaluation.test_evaluation_ranks:shaky'}]"
    for world in (1, 2):
        name = f"shaky{world}"
        assert (
            ranks.run(evaluate, words(folder, name, reward, f"trainer.devices={world}"), tp=None, world=world)[0] == 0
        )
        rows = [json.loads(line) for line in completions(folder / name)]
        assert all(row["failed"] == (row["tokens"] % 4 == 1) for row in rows)
        judged = [row["correct"] for row in rows if not row["failed"]]
        assert 0 < len(judged) < len(rows)
    assert results(folder / "shaky1") == results(folder / "shaky2")
    broken = folder / "broken.jsonl"
    broken.write_text("".join(f'{{"question": "{n}+1=", "answer": "broken"}}\n' for n in range(3)))
    more = [reward, f"+sources.broken={broken}", "benchmarks=[broken]", "fields.level=null"]
    with pytest.raises(RankError, match=r"broken: not one of 6 completions .*by shaky; .*RuntimeError: no verdict"):
        ranks.run(evaluate, words(folder, "broken", *more, "trainer.devices=2"), tp=None, world=2)
    assert not (folder / "broken" / "completions").exists()
