"""A sweep's runs, by words alone; and what becomes of them here. (As an array of jobs: slurm/test_sweep.py.)"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time

import pytest

from nemo_aapo.cli import launch
from nemo_aapo.config import parse
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import REFUSED, ConfigError
from nemo_aapo.launch import sweep
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.launch.sweep import points
from nemo_aapo.run.names import STORE
from tests.tiny_models import save_empty_input


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["seed=1,2", "group_size=8"], ["seed-1", "seed-2"]),
        (["seed=1,2", "model.optim.lr=1e-6,1"], ["seed-1_lr-1e-06", "seed-1_lr-1", "seed-2_lr-1e-06", "seed-2_lr-1"]),
        (["seed=range(1,4)"], ["seed-1", "seed-2", "seed-3"]),
        (["algorithm=aapo,gpg"], ["algorithm-aapo", "algorithm-gpg"]),
        (["data.train=/a/x.jsonl,/b/x.jsonl"], ["train-a_x.jsonl", "train-b_x.jsonl"]),
        (["rollout.top_p=0.9,1", "validation.top_p=1,0.5"], None),  # one leaf twice: named by whole keys
        (["rewards=[{name: accuracy}],[{name: integer}]"], ["rewards-name_accuracy", "rewards-name_integer"]),
        (["seed=1,1,2"], ["seed-1", "seed-2"]),
        (["data.train=a/b,a_b"], ["train-a_b_2348a5", "train-a_b_cf5821"]),
    ],
)  # fmt: skip
def test_every_combination_is_a_run_named_by_its_values(words, names):
    found = points(words)
    if names is not None:
        assert [point.name for point in found] == names
    else:
        assert found[0].name == "rollout.top_p-0.9_validation.top_p-1"
    assert len({point.name.lower() for point in found}) == len(found)
    for point in found:
        assert len(point.overrides) == len(words)
        with pytest.raises(ConfigError, match="no key has several values"):
            points(point.overrides)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1", "no key has several values"),
        ("run.name=a,b", "run.name can't have several values"),
        ("hydra.job.num=1,2", "hydra.job.num can't have several values"),
        ("cluster=slurm,local", "cluster can't have several values"),
        ("seed=1,2 seed=3,4", "seed is given twice"),
        ("seed=1,2 seed=3", "seed is given twice"),
        ("seed=3 ++seed=1,2", "seed is given twice"),
        ("seed=glob(*)", "A sweep takes"),
        ("seed=range(3,1)", "make 0 runs"),
        ("seed=range(0,100) group_size=range(2,22)", "make 2000 runs"),
    ],
)
def test_what_is_no_sweep_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        points(words.split())


def test_a_run_is_what_its_command_alone_would_start_with_the_sweeps_store(tmp_path):
    given = read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v", "seed=1,2"])
    directory = tmp_path / "it's, a \\ sweep"
    command = points(given.overrides)[1].command(given, "lr", directory, str(directory / STORE))
    config = parse(compose(command))
    assert (config.seed, config.run.name, config.run.dir) == (2, "lr-seed-2", str(directory / "seed-2"))
    assert config.algorithm.reference_store == str(directory / "reference_rewards.sqlite")
    assert read_command_line(command.words()) == command


@pytest.fixture(scope="module")
def config():
    return parse(compose(read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v", "cluster=slurm"])))


def test_an_array_has_a_task_for_each_run_and_no_task_waits_for_another(config, tmp_path):
    other = dataclasses.replace(config, seed=2)
    site = Site("python", None, tmp_path)
    script = sweep.render_array([config, other], site, tmp_path / "sweep", 1)
    assert "#SBATCH --array=0-1%1\n" in script
    assert "singleton" not in script
    assert "#SBATCH --signal=B:USR1@300\n" in script
    bigger = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_nodes=2))
    chain = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, chain=2))
    for wrong in ([config, bigger], [chain, chain]):
        with pytest.raises(ConfigError, match=r"launch\.py sweep"):
            sweep.render_array(wrong, site, tmp_path / "sweep", None)


def test_a_sweep_is_refused_where_its_runs_would_be_out_of_sight(tmp_path, capsys):
    words = [*save_empty_input(tmp_path), "seed=1,2", "dry_run=true", "exp_manager.create_tensorboard_logger=false"]
    assert launch.main(["sweep", *words]) == 0
    assert capsys.readouterr().out.count("seed-") == 4
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for directory in ("run", "run/below"):
        assert launch.main(["sweep", *words, f"run.dir={tmp_path}/{directory}"]) == REFUSED
        assert f"run.dir={tmp_path}/{directory}: {tmp_path}/run is a run" in capsys.readouterr().err
    assert launch.main(["sweep", *words, f"run.dir={tmp_path}/train.jsonl"]) == REFUSED
    assert f"{tmp_path}/train.jsonl is a file, where a directory is needed" in capsys.readouterr().err


def test_a_run_is_done_when_it_has_made_the_steps_that_it_is_now_asked_for(config, tmp_path):
    def asked(steps):
        trainer = dataclasses.replace(config.trainer, max_steps=steps)
        return dataclasses.replace(config, trainer=trainer, run=dataclasses.replace(config.run, dir=str(tmp_path)))

    assert not sweep.is_done(asked(5))
    for text in ("", "[]", "{}", json.dumps({"step": 4})):
        (tmp_path / "finished").write_text(text)
        assert not sweep.is_done(asked(5))
    assert sweep.is_done(asked(4))


WRITE = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(float(sys.argv[2]))"


@pytest.mark.slow
def test_runs_start_so_many_at_a_time_one_failure_leaves_the_others_and_a_signal_starts_no_more(tmp_path):
    said = []
    codes = {"a": "exit(3)", "b": "print('hello')"}
    commands = [(tmp_path / name, [sys.executable, "-c", code]) for name, code in codes.items()]
    assert sweep.run_here(commands, 1, said.append) == 3
    assert said[:2] == ["a: started, 1 to come", f"a: exit code 3; see {tmp_path}/a/logs/sweep.log"]
    assert said[2:] == ["b: started, 0 to come", "b: ended"]
    assert (tmp_path / "b" / "logs" / "sweep.log").read_text() == "hello\n"

    marks = [tmp_path / f"mark_{i}" for i in range(3)]
    commands = [(tmp_path / f"c{i}", [sys.executable, "-c", WRITE, str(mark), "600"]) for i, mark in enumerate(marks)]

    def interrupt():
        while not all(mark.exists() for mark in marks[:2]):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert sweep.run_here(commands, 2, said.append) == 128 + signal.SIGTERM
    assert not marks[2].exists()
