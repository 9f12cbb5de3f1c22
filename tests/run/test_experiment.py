"""What a run leaves: whole files, no gap or repeat over resumes."""

from __future__ import annotations

import inspect
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.run import experiment as experiment_module
from nemo_aapo.run.experiment import Experiment, SilentExperiment, open_experiment, rollout_rows
from nemo_aapo.run.metrics_file import MetricsFile, read_metrics
from nemo_aapo.types import Completion, Group, Prompt
from nemo_aapo.utils.files import to_json, write_atomic
from tests.run.opened import opened


def test_any_sequence_of_interruptions_leaves_the_lines_of_an_uninterrupted_run(settings):
    """Train in parts that end at random steps, each resuming from the last multiple of 3, as checkpoints would."""
    total, every = 20, 3
    dice = random.Random(0)

    def part(start: int, end: int) -> None:
        with opened(settings) as run:
            run.resume_at(start or -1)  # there is no checkpoint of step 0
            if start == 0:
                run.log_validation(0, {"validation/accuracy_greedy": 0.0})
            for step in range(start + 1, end + 1):
                run.log_step(step, {"loss": float(step)})
                if step % every == 0:
                    run.log_validation(step, {"validation/accuracy_greedy": float(step)})
                run.save_rollouts(f"step_{step:06d}", [{"step": step}])

    part(0, 1)  # ended before its first checkpoint: the next part begins anew
    end = 0
    for _ in range(6):
        start = end - end % every
        end = dice.randint(start, min(start + 8, total - 1))
        part(start, end)
        with (Path(settings[0].run.dir) / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "lo')  # killed in the middle of a line
    part(end - end % every, total)
    records = read_metrics(Path(settings[0].run.dir) / "metrics.jsonl")
    expected = []
    for step in range(total + 1):
        expected += [{"step": step, "loss": float(step)}] if step else []
        expected += [{"step": step, "validation/accuracy_greedy": float(step)}] if step % every == 0 else []
    assert records == expected
    rollouts = sorted(path.name for path in (Path(settings[0].run.dir) / "rollouts").iterdir())
    assert rollouts == [f"step_{step:06d}.jsonl" for step in range(1, total + 1)]


def test_resuming_removes_rollouts_and_traces_of_later_steps_and_the_finished_marker(settings):
    with opened(settings) as run:
        run.resume_at(-1)
        for step in (1, 2):
            run.save_rollouts(f"step_{step:06d}", [])
            write_atomic(run.directory / "trace" / f"step_{step:06d}.json", "{}")
        run.finish({"steps": 2})
    finished = run.directory / "finished"
    assert json.loads(finished.read_text()) == {"steps": 2}
    with opened(settings) as run:
        assert finished.exists()
        run.resume_at(1)
        assert not finished.exists()
        assert [path.name for path in (run.directory / "rollouts").iterdir()] == ["step_000001.jsonl"]
        assert [path.name for path in (run.directory / "trace").iterdir()] == ["step_000001.json"]


def test_lines_are_on_the_disk_once_they_are_synced_and_a_resumed_run_says_which_it_lacks(settings, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    path = Path(settings[0].run.dir) / "metrics.jsonl"
    with opened(settings) as run:
        run.resume_at(-1)
        for step in range(1, 6):
            run.log_step(step, {"loss": 1.0})
        monkeypatch.setattr(os, "fsync", spy)
        run.sync()
    assert [(str(path), path.stat().st_size), str(path.parent)] == [synced[0], synced[1][0]]
    with opened(settings) as run:
        run.resume_at(5)
        assert run.warnings == []
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # what a crash leaves of a file that was not brought to the disk
    with opened(settings) as run:
        run.resume_at(5)
        (warning,) = run.warnings
        assert f"{path} ends at step 3, before the checkpoint of step 5" in warning
        run.log_step(6, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 6]


def test_a_validation_that_is_to_be_made_again_leaves_neither_its_line_nor_its_completions(settings):
    with opened(settings) as run:
        run.resume_at(-1)
        for step in (1, 2):
            run.log_step(step, {"loss": 0.5})
            run.log_validation(step, {"validation/accuracy_greedy": 0.5})
            for name in (f"step_{step:06d}", f"train_{step:06d}"):
                run.save_rollouts(name, [])
    with opened(settings) as run:
        run.resume_at(2, validated=False)
    lines = [(record["step"], "loss" in record) for record in read_metrics(run.directory / "metrics.jsonl")]
    assert lines == [(1, True), (1, False), (2, True)]
    kept = sorted(path.stem for path in (run.directory / "rollouts").iterdir())
    assert kept == ["step_000001", "train_000001", "train_000002"]


def test_a_checkpoint_of_step_0_keeps_the_first_validation(settings):
    with opened(settings) as run:
        run.resume_at(-1)
        run.log_validation(0, {"validation/accuracy_greedy": 0.5})
    with opened(settings) as run:
        run.resume_at(0)
    assert [record["step"] for record in read_metrics(run.directory / "metrics.jsonl")] == [0]


def test_a_logger_whose_server_has_gone_away_is_left_out_and_ends_no_run(settings, monkeypatch, capsys):
    class Logger:
        told = 0

        def log_metrics(self, metrics, step):
            self.told += 1
            if step == 2:
                raise ConnectionError("the server is gone\nmore")

        def finalize(self, status): ...

    gone, well = Logger(), Logger()
    well.log_metrics = lambda metrics, step: setattr(well, "told", well.told + 1)
    monkeypatch.setattr(experiment_module, "nemo_loggers", lambda config, run_id: [gone, well])
    for name in ("_begin", "_forget_after"):  # which know Lightning's loggers
        monkeypatch.setattr(experiment_module, name, lambda logger, what: None)
    with opened(settings) as run:
        run.resume_at(-1)
        for step in (1, 2, 3):
            run.log_step(step, {"loss": 1.0})
        run.finish({})
    assert (gone.told, well.told) == (2, 3)
    assert capsys.readouterr().err == "warning: Logger is left out from now on: the server is gone\n"
    assert [line["step"] for line in read_metrics(run.directory / "metrics.jsonl")] == [1, 2, 3]


def test_a_step_can_not_be_logged_twice_nor_before_the_record_knows_where_it_stands(settings):
    with opened(settings) as run:
        with pytest.raises(RuntimeError):
            run.log_step(1, {})
        with pytest.raises(RuntimeError):
            run.log_validation(0, {})
        run.resume_at(4)
        with pytest.raises(RuntimeError):
            run.log_step(4, {})
        run.log_step(5, {})
        with pytest.raises(RuntimeError):
            run.log_step(5, {})


def test_lines_are_strict_json_and_readable_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(1, {"a": float("nan"), "b": np.float32(np.inf), "c": np.int64(3), "d": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()  # not closed yet

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 3, "d": 0.5}


def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_thrown_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n{"st\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricsFile(path).truncate_after(1)
    assert path.read_text() == text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_ranks_take_every_call_and_write_nothing(settings):
    silent = open_experiment(*settings, rank=1, world_size=2)
    assert isinstance(silent, SilentExperiment)
    for name, method in inspect.getmembers(Experiment, inspect.isfunction):
        if not name.startswith("_") or name in ("__enter__", "__exit__"):
            assert inspect.signature(method).parameters.keys() == inspect.signature(
                getattr(silent, name)
            ).parameters.keys() | {"self"}
    with silent:
        silent.resume_at(0)
        silent.log_step(1, {})
        silent.finish({})
    assert not Path(settings[0].run.dir).exists()


def test_rollout_rows_say_everything_of_each_completion(tmp_path):
    ids = np.arange(2, dtype=np.int32)
    completions = tuple(Completion(ids, np.zeros(2, np.float32), reason, 0) for reason in ("stop", "length"))
    group = Group(
        prompt=Prompt("id", ids, "2+2?", "4", "file:1"),
        completions=completions,
        texts=("4 \u2713", "five"),
        rewards=np.array([1.5, 0.0]),
        reward_parts={"accuracy": np.array([1.0, 0.0]), "format": np.array([0.5, np.nan])},
        failed=np.zeros(2, bool),
        advantages=np.array([0.7, -0.9]),
    )
    rows = [json.loads(to_json(row)) for row in rollout_rows([group])]
    common = {"prompt": "2+2?", "answer": "4", "tokens": 2, "source": "file:1"}
    assert rows == [
        common
        | {"completion": "4 \u2713", "reward": 1.5, "reward_parts": {"accuracy": 1.0, "format": 0.5}}
        | {"advantage": 0.7, "finish_reason": "stop"},
        common
        | {"completion": "five", "reward": 0.0, "reward_parts": {"accuracy": 0.0, "format": None}}
        | {"advantage": -0.9, "finish_reason": "length"},
    ]
    assert rollout_rows([group.replace(advantages=None)])[0]["advantage"] is None
    assert rollout_rows([group.replace(texts=())]) == []  # a rank without the texts
