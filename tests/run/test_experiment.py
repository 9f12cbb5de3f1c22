"""What a run leaves: whole files, no gap or repeat over resumes, one run a directory. (NeMo's part: test_entry.py.)"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import inspect
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from nemo_aapo.config import parse, with_machine_defaults
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.run import directory as directory_module
from nemo_aapo.run import experiment as experiment_module
from nemo_aapo.run.directory import check_run_directory, claim
from nemo_aapo.run.experiment import Experiment, SilentExperiment, open_experiment, rollout_rows
from nemo_aapo.run.metrics_file import MetricsFile, read_metrics
from nemo_aapo.run.reporter import RunReporter
from nemo_aapo.types import Completion, Group, Prompt
from nemo_aapo.utils.files import to_json, write_atomic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page():
    return compose(read_command_line(["model.path=/m", "data.train=/t", "data.validation=/v"]))


@pytest.fixture
def settings(page, tmp_path, monkeypatch):
    """A typed configuration and its tree, in a run directory of this test; without NeMo's loggers."""
    monkeypatch.setattr(experiment_module, "nemo_loggers", lambda config, run_id: [])
    tree = {**page, "run": {"name": "test", "dir": str(tmp_path / "run")}}
    return parse(tree), tree


def changed(tree, **sections):
    tree = {**tree, **{name: {**tree[name], **values} for name, values in sections.items()}}
    return parse(tree), tree


def opened(settings):
    return open_experiment(*settings, rank=0, world_size=1)


def start_holder(directory: str, then: str) -> subprocess.Popen[bytes]:
    """Another process that locks the run directory."""
    Path(directory).mkdir()
    code = "import os, time\nfrom pathlib import Path\nfrom nemo_aapo.run.directory import lock_directory\n"
    code += f"lock = lock_directory(Path({directory!r}), '')\n{then}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)


def test_a_run_directory_that_nothing_can_be_written_in_is_refused(settings, tmp_path):
    (tmp_path / "file").touch()
    for directory, said in ((tmp_path / "file" / "run", "can't be made"), ("/sys", "can't be written")):
        config, tree = changed(settings[1], run={"dir": str(directory)})
        check_run_directory(config)  # nothing of another run
        with pytest.raises(ConfigError, match=rf"{directory}: {said} \("):
            claim(config, tree, 1)


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


def test_the_directory_says_what_ran_in_it(settings):
    config, tree = settings
    for _ in range(2):
        with opened(settings) as run:
            run.resume_at(-1)
    assert yaml.safe_load((run.directory / "config.yaml").read_text()) == tree
    assert parse(yaml.safe_load((run.directory / "config.yaml").read_text())) == config
    starts = json.loads((run.directory / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0]["versions"]["torch"]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_run_goes_on_with_what_the_machine_decided_at_its_first_start(settings, on_gpu):
    config, tree = settings
    claim(with_machine_defaults(config, on_gpu=on_gpu), tree, 1)[0].close()
    (Path(config.run.dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    check_run_directory(config)  # before the machine is asked
    with pytest.raises(ConfigError, match=r'precision\.name: "\w+" there, "(fp32|bf16)" now'):
        check_run_directory(changed(tree, precision={"name": "fp32" if on_gpu else "bf16"})[0])


def test_another_configuration_is_refused_with_the_keys_that_differ_and_a_remedy(settings):
    config, tree = settings
    claim(config, tree, 1)[0].close()
    (Path(config.run.dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    before = {path: path.read_bytes() for path in Path(config.run.dir).iterdir()}
    same = changed(tree, trainer={"devices": 4, "max_steps": 7}, checkpoint={"keep_last": 9})
    check_run_directory(same[0])
    other = changed(tree, rollout={"temperature": 0.7}, data={"system_prompt": "Think."}, trainer={"max_steps": 7})
    for refuse in (lambda: check_run_directory(other[0]), lambda: opened(other)):
        with pytest.raises(ConfigError) as refusal:
            refuse()
        said = str(refusal.value)
        assert "rollout.temperature: 1.0 there, 0.7 now" in said
        assert 'data.system_prompt: null there, "Think." now' in said
        assert "max_steps" not in said
        assert "run.name=NAME" in said
    assert {path: path.read_bytes() for path in Path(config.run.dir).iterdir()} == before
    opened(settings).close()  # the refusal gave the lock back


def test_a_start_that_nothing_came_of_does_not_keep_its_directory(settings):
    """A run refused for its data is mended and started again under its name."""
    config, tree = settings
    claim(config, tree, 1)[0].close()
    mended, mended_tree = changed(tree, data={"system_prompt": "Think."})
    check_run_directory(mended)
    claim(mended, mended_tree, 1)[0].close()
    record = json.loads((Path(config.run.dir) / "run.json").read_text())
    assert record["settings"]["data"]["system_prompt"] == "Think."
    assert len(record["starts"]) == 1
    (Path(config.run.dir) / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="another configuration"):
        check_run_directory(config)


@pytest.mark.slow
def test_a_directory_that_a_live_process_uses_is_refused_and_free_once_it_is_dead(settings):
    config, tree = settings
    holder = start_holder(config.run.dir, "print(flush=True); time.sleep(50)")
    holder.stdout.readline()
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on .*run\.name=NAME"):
        opened(settings)
    holder.kill()
    holder.wait(timeout=20)
    with opened(settings), pytest.raises(ConfigError, match="in use by process"):
        claim(config, tree, 1)


@pytest.mark.slow
def test_a_forked_worker_that_outlives_the_run_does_not_keep_the_directory(settings):
    config, tree = settings
    parent = start_holder(config.run.dir, "child = os.fork(); print(child, flush=True) if child else time.sleep(50)")
    worker = int(parent.stdout.readline())
    try:
        assert parent.wait(timeout=20) == 0
        claim(config, tree, 1)[0].close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_no_reason_not_to_train(settings, monkeypatch):
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    opened(settings).close()


def test_a_damaged_record_is_named(settings):
    config, tree = settings
    claim(config, tree, 1)[0].close()
    (Path(config.run.dir) / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: damaged"):
        check_run_directory(config)


def test_a_stop_file_of_an_earlier_part_is_removed(settings):
    Path(settings[0].run.dir).mkdir()
    stop = Path(settings[0].run.dir) / "stop"
    stop.touch()
    opened(settings).close()
    assert not stop.exists()


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


def test_a_run_that_goes_on_by_another_instruction_set_says_so(settings, monkeypatch):
    said = []
    progress = type("Progress", (), {"note": lambda self, text: said.append(text)})()
    for chip, step in (("AVX512", -1), ("AVX512", 2), ("AVX2", 2), ("AVX2", 4), ("sm_90", -1)):
        monkeypatch.setattr(directory_module, "instruction_set", lambda chip=chip: chip)
        with opened(settings) as run:
            RunReporter(run, progress, stop=None, console_samples=0).begin(step)
    starts = json.loads((Path(settings[0].run.dir) / "run.json").read_text())["starts"]
    assert [start["instruction_set"] for start in starts] == ["AVX512", "AVX512", "AVX2", "AVX2", "sm_90"]
    assert [text for text in said if "going on from" not in text] == [
        "warning: the start before this one computed by AVX512, this machine computes by AVX2: "
        "the run goes on, but not to the same bits"
    ]


def test_a_run_that_goes_on_with_a_changed_algorithm_of_ones_own_says_so(settings, tmp_path):
    config, tree = settings
    file, said = tmp_path / "mine.py", []
    progress = type("Progress", (), {"note": lambda self, text: said.append(text)})()
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, custom=f"{file}:Mine"))
    for text in ("one", "one", "two", "two"):
        file.write_text(text)
        with opened((config, tree)) as run:
            RunReporter(run, progress, stop=None, console_samples=0).begin(2)
    [warning] = [words for words in said if "going on from" not in words]
    assert warning.startswith("warning: the file of algorithm.custom has changed since the start before this one")


@pytest.mark.slow
def test_the_instruction_set_is_that_by_which_torch_computes():
    code = "from nemo_aapo.run.directory import instruction_set; print(instruction_set())"
    narrow = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=narrow, stdout=subprocess.PIPE, text=True).stdout
    assert said.split(",")[0].strip() == "DEFAULT"
