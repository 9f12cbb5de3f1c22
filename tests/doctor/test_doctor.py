"""Each of doctor's checks is ok where all is well, and finds what is really broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch

from nemo_aapo import lines
from nemo_aapo.config.schema import Lora
from nemo_aapo.doctor.catalog import select
from nemo_aapo.doctor.checks import files, memory, model, rewards, sizes, slurm, versions
from nemo_aapo.doctor.finding import Place
from nemo_aapo.doctor.guard import run_guarded
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import ARCHITECTURES, shape_of
from nemo_aapo.models.weights import expected_tensors
from tests.doctor.contexts import check, context, distribution, failure, program, rank
from tests.tiny_models import make_config, save_empty_model, save_headers

# ---------------------------------------------------------------- versions


def test_versions_are_those_that_were_tested_here():
    assert versions.versions(context()).level == "ok"


def test_what_is_of_the_other_line_of_megatron_is_a_failure(tmp_path, monkeypatch):
    assert f"line {lines.installed().name}, " in versions.versions(context()).text
    other = next(line for line in lines.LINES.values() if line is not lines.installed())
    for name in ("megatron-bridge", "transformers"):
        distribution(tmp_path, name.replace("-", "_"), other.pins[name])
    monkeypatch.syspath_prepend(tmp_path)
    found = versions.versions(context())
    assert found.level == "failure"
    for name in ("megatron-bridge", "transformers"):
        assert f"{name} {other.pins[name]} is of the line {other.name} (here" in found.text
    assert "environment.sh --line trtllm or newest" in found.remedy


def test_another_version_is_a_warning_and_a_missing_package_a_failure(tmp_path, monkeypatch):
    distribution(tmp_path, "safetensors", "0.0.1")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions.versions(context())
    assert found.level == "warning"
    assert "safetensors 0.0.1 (tested: 0." in found.text
    assert "-r requirements/cpu.txt" in found.remedy
    (tmp_path / "cpu.txt").write_text("# Learner\nno-such-package==1.0\nnumpy==1.0\n# Tests and building\nneither==1\n")
    (tmp_path / "bridge.txt").touch()
    monkeypatch.setattr(versions, "REQUIREMENTS", tmp_path)
    found = versions.versions(context())
    assert found.level == "failure"
    assert "no-such-package" in found.text
    assert "neither" not in found.text


# ---------------------------------------------------------------- Slurm and ports


def test_no_slurm_is_fine_unless_the_run_is_for_one(only_on_path, config):
    assert slurm.slurm_tools(context(config)).level == "ok"
    there = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, kind="slurm"))
    assert slurm.slurm_tools(context(there)).level == "failure"


@pytest.mark.slow
def test_a_command_of_slurm_that_hangs_or_fails_is_named(only_on_path, config, monkeypatch):
    monkeypatch.setattr(slurm, "ANSWER_S", 1.0)
    there = context(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, kind="slurm")))
    for tool in slurm.QUESTIONS:
        program(only_on_path, tool, "echo fine")
    monkeypatch.setattr(slurm, "ANSWER_S", 30.0)
    assert slurm.slurm_tools(there).text == "sbatch, srun, squeue, scontrol, sacct answer"
    program(only_on_path, "sacct", "echo 'sacct: error: Slurm accounting storage is disabled' >&2; exit 1")
    found = slurm.slurm_tools(there)
    assert (found.level, found.text) == ("warning", "sacct: error: Slurm accounting storage is disabled")
    program(only_on_path, "squeue", "exec sleep 60")
    monkeypatch.setattr(slurm, "ANSWER_S", 1.0)
    found = slurm.slurm_tools(there)
    assert found.level == "failure"
    assert "squeue: `squeue` did not answer within 1 s" in found.text


def test_a_port_that_is_taken_is_named(config, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert slurm.ports(context()).level == "ok"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = dataclasses.replace(config.rollout.server, port=port)
        served = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, server=server))
        assert slurm.ports(context(served)).text == f"rollout.server.port={port}: Address already in use"
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert slurm.ports(context()).text == f"MASTER_PORT={port}: Address already in use"
        assert slurm.ports(context(place=rank(0, 2))).level == "ok"  # the ranks themselves have it
    assert slurm.ports(context(served)).level == "ok"


# ---------------------------------------------------------------- files, disk, memory


def test_the_run_directorys_file_system_is_tried_and_left_as_it_was(config, tmp_path):
    found = files.file_system(context(config))
    assert found.level in ("ok", "warning"), found  # a warning where this machine is slow just now
    assert "MB/s" in found.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_a_failure(config):
    nowhere = dataclasses.replace(config, run=dataclasses.replace(config.run, dir="/proc/aapo"))
    (found,) = run_guarded(check("file_system"), context(nowhere))
    assert found.level == "failure"
    assert "nothing can be written in /proc" in found.text


@pytest.mark.slow
def test_a_run_directory_of_another_run_is_a_failure(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"id": "1", "digest": "other", "settings": {}, "starts": []}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    (found,) = run_guarded(check("file_system"), context(config))
    assert found.level == "failure"
    assert "another configuration" in found.text


def seen_by(folders: list[Path], config) -> dict[int, str]:
    """What ranks say, each of which has its run directory somewhere."""
    found: dict[int, str] = {}

    def look(number: int) -> None:
        own = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folders[number])))
        found[number] = files.shared_files(context(own, Place(number, len(folders), 0, 1, "host")), wait_s=2.0).text

    threads = [threading.Thread(target=look, args=(number,)) for number in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.slow
def test_ranks_on_file_systems_of_their_own_are_found_out(config, tmp_path):
    shared = seen_by([tmp_path, tmp_path], config)
    assert all("all 2 ranks see each other's files" in text for text in shared.values())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    apart = seen_by([tmp_path / "one", tmp_path / "two"], config)
    assert "no file of rank 1 is seen" in apart[0]
    assert "no file of rank 0 is seen" in apart[1]
    assert [path.name for path in tmp_path.rglob(".aapo_doctor_*")] == []


def test_disk_space_is_that_of_the_kept_checkpoints_and_the_export(config):
    weights = sizes.count_parameters(Path(config.model.path)) * 4
    assert files.disk(context(config)).level == "ok"
    assert files.disk_need(sizes.on_this_machine(config))[0] == 3 * 3 * weights + weights
    adapters = Lora(rank=4, alpha=8, target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    light = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=adapters))
    kept = weights + 3 * 13_312 * 4  # adapters of 13,312 numbers, each with two moments
    assert files.disk_need(sizes.on_this_machine(light))[0] == 3 * kept + weights
    many = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep_last=10**12))
    assert files.disk(context(many)).level == "failure"


def test_checkpoints_that_are_there_already_need_no_space_again(config):
    whole, _ = files.disk_need(sizes.on_this_machine(config))
    one = 3 * sizes.count_parameters(Path(config.model.path)) * 4
    for count, there in enumerate((one, 2 * one, 3 * one, 3 * one), 1):  # of the fourth, which is one too many, nothing
        checkpoint = Path(config.run.dir) / "checkpoints" / f"step_{count:06d}"
        checkpoint.mkdir(parents=True)
        with (checkpoint / "part").open("wb") as file:
            file.truncate(one)
        need, text = files.disk_need(sizes.on_this_machine(config))
        assert need == whole - there
        assert f"{sizes.readable(there)} are there already" in text
        put_aside = checkpoint.with_name(f"{checkpoint.name}.damaged")  # which is never removed: it gives nothing back
        shutil.copytree(checkpoint, put_aside)
        assert files.disk_need(sizes.on_this_machine(config)) == (need, text)


def test_memory_is_held_against_the_plan_and_its_lower_bound(config):
    weights = sizes.count_parameters(Path(config.model.path)) * 4
    training = memory.rank_memory(memory.planned_inputs(sizes.on_this_machine(config), 2**30)).phases["train"]
    assert [training[part] for part in memory.DEVICE_PARTS] == [weights, weights, 2 * weights]
    gib = 2**30
    assert memory.judge("gpu_memory", 50 * gib, 80 * gib, "weights", peak=70 * gib).level == "ok"
    assert memory.judge("gpu_memory", 50 * gib, 80 * gib, "weights", peak=90 * gib).level == "warning"
    assert memory.judge("gpu_memory", 90 * gib, 80 * gib, "weights", peak=95 * gib).level == "failure"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_that_trains_is_looked_at_planned_or_not(architecture, tmp_path):
    family = {"head_dim": 16, "num_experts": 8 * ("oe" in architecture), "sliding_window": 64}
    path = save_empty_model(tmp_path / "model", architectures=[architecture], **family)
    lora = {"rank": 4, "alpha": 8, "target_modules": ["linear_qkv"]}
    config = make_config(path, run__dir=str(tmp_path / "run"), model__lora=lora)
    assert model.model(
        context(dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="plain")))
    )
    assert files.disk(context(config)).level == "ok"
    assert {found.level for found in memory.memory(context(config))} <= {"ok", "skipped"}


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage", "cache"),
    [
        ("0::", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_smallest_limit_around_this_process_counts_and_the_page_cache_in_it_is_free(
    tmp_path, line, folder, limit, usage, cache
):
    """That of a Slurm job is on its group, its steps' groups below have none; of a container it is at the root."""
    root, own, free = tmp_path / "cgroup", tmp_path / "own", {}
    own.write_text(f"9:pids:/other\n{line}/job_7/step_0/task 1\n")
    for path, most in (("", 2**30), ("job_7", 2**20), ("job_7/step_0", "max"), ("job_8", 4096)):
        (group := root / folder / path).mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / usage).write_text("8192\n")
        (group / "memory.stat").write_text(f"anon 1\n{cache} 4096\n")
        free[path] = memory.free_host_memory(root, own)
    assert list(free.values()) == [2**30 - 4096, *[2**20 - 4096] * 3]
    own.write_text(f"{line}/not/seen/in/this/container\n")
    assert memory.free_host_memory(root, own) == 2**30 - 4096


def test_the_fullest_gpu_of_the_ranks_here_decides(config, monkeypatch):
    """A machine of four GPUs with two ranks; another program has the second one's memory, and the third's."""
    free = [80 * 2**30, 4096, 0, 80 * 2**30]
    monkeypatch.setattr(memory, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 80 * 2**30))
    found = {two.name: two for two in memory.memory(context(config, Place(0, 2, 0, 2, "host")))}["gpu_memory"]
    assert (found.level, found.text.partition(" free")[0]) == ("failure", sizes.readable(4096))
    found = {one.name: one for one in memory.memory(context(config))}["gpu_memory"]
    assert found.level == "ok"


def test_too_little_memory_is_a_failure(config, monkeypatch):
    assert all(finding.level == "ok" for finding in memory.memory(context(config)))
    served = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="remote"))
    assert [finding.name for finding in memory.memory(context(served))] == ["host_memory", "server_memory"]
    monkeypatch.setattr(memory, "free_host_memory", lambda: 2**20)
    (found,) = memory.memory(context(config))
    assert (found.name, found.level) == ("host_memory", "failure")


# ---------------------------------------------------------------- model, tokenizer, rewards


@pytest.mark.slow
def test_a_whole_model_directory_is_ok_and_a_broken_one_is_named(config, tiny_models, tmp_path):
    assert "Qwen2ForCausalLM, 4 layers" in model.model(context(config)).text
    assert "no chat template" in model.tokenizer(context(config)).text
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], copy)
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(copy)))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "where its header promises" in failure("model", broken)
    save_headers(weights, {"model.norm.weight": (64,)}, "F8_E4M3")
    assert "weights of dtype F8_E4M3 (model.norm.weight)" in failure("model", broken)
    for file in copy.glob("*token*"):
        file.unlink()
    assert "no tokenizer here" in failure("tokenizer", broken)


@pytest.mark.slow
def test_a_layout_that_does_not_divide_the_model_is_a_failure(config):
    cut = dataclasses.replace(config, model=dataclasses.replace(config.model, tensor_model_parallel_size=3))
    assert "tensor_model_parallel_size=3 does not divide" in failure("model", cut)


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_a_failure(config, tiny_models, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], copy)
    settings = json.loads((copy / "config.json").read_text())
    smaller = {**settings, "vocab_size": 90}
    (copy / "config.json").write_text(json.dumps(smaller))
    save_headers(copy / "model.safetensors", expected_tensors(shape_of(smaller)))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(copy)))
    assert "has 97 tokens with ids up to 96, the model's vocabulary 90 rows" in failure("tokenizer", other)


@pytest.mark.slow
def test_reward_workers_tell_right_from_wrong_and_a_hostile_one_is_killed(tiny_models, tmp_path):
    every = [{"name": name, "weight": 1.0} for name in ("accuracy", "integer", "exact", "format")]
    config = make_config(tiny_models["qwen2"], rewards=[*every, {"name": "cosine", "max_tokens": 8}])
    found = rewards.rewards(context(config))
    assert found.level == "ok", found
    assert found.text.startswith("accuracy 1 for right, 0 for wrong, integer 1 for right, 0 for wrong")
    assert found.text.endswith("(1 worker); one that never ends is killed in time")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "timeout_s", "text"),
    [
        ("import time; time.sleep(600)", 1.0, "right answer could not be scored: timeout"),
        ("raise KeyError('url')", 60.0, "right answer could not be scored: error: mine: KeyError"),
    ],
)
def test_a_reward_that_hangs_or_raises_is_a_failure(tiny_models, tmp_path, body, timeout_s, text):
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(prompt, completion, answer, **info):\n    {body}\n")
    entry = {"name": "custom", "function": f"{path}:mine"}
    limit = {"reward_runner__timeout_s": timeout_s}
    config = make_config(tiny_models["qwen2"], rewards=[entry], validation__reward="mine", **limit)
    assert text in failure("rewards", config)


@pytest.mark.slow
def test_a_reward_that_prefers_the_wrong_answer_is_a_failure(tiny_models):
    upside_down = {"name": "cosine", "max_tokens": 8, "correct_short": -1.0, "verifier": "integer"}
    config = make_config(tiny_models["qwen2"], rewards=[upside_down], validation__reward="cosine")
    assert "for the right answer" in failure("rewards", config)


# ---------------------------------------------------------------- the catalogue


def test_checks_are_chosen_by_name():
    assert [c.name for c in select(["gpu", "disk"], ["disk"], quick=False)] == ["gpu"]
    assert all(not c.needs_config for c in select([], [], quick=True))
    with pytest.raises(ConfigError, match="there is no check 'gpus'"):
        select(["gpus"], [], quick=False)
    with pytest.raises(ConfigError, match="no check is left"):
        select(["parity"], [], quick=True)
