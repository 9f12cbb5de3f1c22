"""One run a directory, whose record says what ran in it and refuses what differs."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_aapo.config import parse, with_machine_defaults
from nemo_aapo.errors import ConfigError
from nemo_aapo.run import directory as directory_module
from nemo_aapo.run.directory import check_run_directory, claim, lock_directory
from nemo_aapo.run.reporter import RunReporter
from tests.run.opened import changed, opened

ROOT = Path(__file__).resolve().parents[2]


def start_holder(directory: str, then: str) -> subprocess.Popen[bytes]:
    """Another process that locks the run directory."""
    Path(directory).mkdir()
    code = "import os, time\nfrom pathlib import Path\nfrom nemo_aapo.run.directory import lock_directory\n"
    code += f"lock = lock_directory(Path({directory!r}), '')\n{then}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)


def test_a_run_directory_that_nothing_can_be_written_in_is_refused(settings, tmp_path):
    (tmp_path / "file").touch()
    for directory, said in (
        (tmp_path / "file" / "run", f"{tmp_path}/file is a file"),
        ("/sys", "nothing can be written"),
    ):
        config, tree = changed(settings[1], run={"dir": str(directory)})
        with pytest.raises(ConfigError, match=f"{directory}: {said}"):
            check_run_directory(config)
        with pytest.raises(ConfigError, match=f"{directory}: {said}"):
            claim(config, tree, 1)


def test_the_lock_of_an_editor_which_is_a_link_that_leads_nowhere_keeps_no_run_from_going_on(settings):
    directory = Path(settings[0].run.dir)
    directory.mkdir(parents=True)
    (directory / ".#stop").symlink_to("somebody@a_host.4711")
    check_run_directory(settings[0])
    (directory / "checkpoints").symlink_to("/purged")
    with pytest.raises(ConfigError, match="checkpoints is a link to /purged, which is not there"):
        check_run_directory(settings[0])


def test_a_directory_whose_disk_went_away_after_it_was_checked_is_refused_in_words(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"run\.dir=results/x: can't be written \(File exists\)"):
        lock_directory(tmp_path / "run", "results/x")


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


def test_a_run_that_goes_on_by_another_instruction_set_than_its_checkpoints_says_so(settings, monkeypatch):
    """Not than the last start's, which may have died while it loaded (None), or have left no checkpoint."""
    said = []
    progress = type("Progress", (), {"note": lambda self, text: said.append(text)})()
    starts = [("AVX512", -1), ("AVX512", 2), ("AVX2", None), ("AVX2", 4), ("AVX512", 4), ("AVX2", 4), ("AVX2", 6)]
    starts += [("sm_90", -1)]
    told = []
    for chip, step in starts:
        monkeypatch.setattr(directory_module, "instruction_set", lambda chip=chip: chip)
        with opened(settings) as run:
            if step is not None:
                RunReporter(run, progress, stop=None, console_samples=0).begin(step, validated=True)
        told.append([text for text in said if "computes by" in text])
        said.clear()
    recorded = json.loads((Path(settings[0].run.dir) / "run.json").read_text())["starts"]
    assert [(start["instruction_set"], start.get("from_step")) for start in recorded] == starts
    warning = (
        "warning: the checkpoint of step 4 was computed by AVX512, this machine computes by AVX2: "
        "the run goes on, but not to the same bits"
    )
    assert told == [[], [], [], [warning], [], [warning], [], []]


def test_a_run_that_goes_on_with_a_changed_algorithm_of_ones_own_says_so(settings, tmp_path):
    config, tree = settings
    file, said = tmp_path / "mine.py", []
    progress = type("Progress", (), {"note": lambda self, text: said.append(text)})()
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, custom=f"{file}:Mine"))
    for text, step in (("one", -1), ("one", 2), ("two", 4), ("two", 6)):
        file.write_text(text)
        with opened((config, tree)) as run:
            RunReporter(run, progress, stop=None, console_samples=0).begin(step, validated=True)
    [warning] = [words for words in said if "algorithm.custom" in words]
    assert warning.startswith("warning: the file of algorithm.custom has changed since the checkpoint of step 4")


@pytest.mark.slow
def test_the_instruction_set_is_that_by_which_torch_computes():
    code = "from nemo_aapo.run.directory import instruction_set; print(instruction_set())"
    narrow = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=narrow, stdout=subprocess.PIPE, text=True).stdout
    assert said.split(",")[0].strip() == "DEFAULT"
