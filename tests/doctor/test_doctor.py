"""Each of doctor's checks is ok where all is well, and finds what is really broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
from pathlib import Path

import pytest

from nemo_aapo.config.schema import Lora
from nemo_aapo.doctor.catalog import CHECKS, select
from nemo_aapo.doctor.checks import files, gpu, memory, model, rewards, sizes, slurm, versions
from nemo_aapo.doctor.checks.gpu import Gpu, Gpus
from nemo_aapo.doctor.finding import Check, Context, Place
from nemo_aapo.doctor.guard import run_guarded
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.errors import ConfigError
from nemo_aapo.mcore.kernels import Libraries, fused_kernels
from tests.tiny_models import make_config

ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, host="here")
B200 = Gpu("NVIDIA B200", (10, 0), 180 * 2**30)
H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
A100 = Gpu("NVIDIA A100", (8, 0), 80 * 2**30)
L40 = Gpu("NVIDIA L40S", (8, 9), 48 * 2**30)


def context(config=None, place: Place = ALONE, token: str = "token") -> Context:
    return Context(config, place, port=0, token=token)


def rank(number: int, of: int) -> Place:
    return Place(number, of, number, of, f"host{number}")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def distribution(folder: Path, name: str, version: str) -> None:
    """What an installer leaves behind."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def config(tiny_models, tmp_path):
    return make_config(tiny_models["qwen2"], run__dir=str(tmp_path / "run"))


@pytest.fixture
def only_on_path(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH but for the shell's own programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    program(folder, "sleep", f'exec {shutil.which("sleep", path="/bin:/usr/bin")} "$@"')
    return folder


# ---------------------------------------------------------------- versions


def test_versions_are_those_that_were_tested_here():
    assert versions.versions(context()).level == "ok"


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


# ---------------------------------------------------------------- GPUs and what computes on them


def test_a_machine_without_gpu_is_ok_unless_the_configuration_needs_one(config):
    none = Gpus((), None, None)
    assert gpu.judge_gpus(none, None, 1).level == "ok"
    assert gpu.judge_gpus(none, config, 1).level == "ok"
    assert gpu.judge_gpus(dataclasses.replace(none, cuda="13.0"), config, 1).level == "warning"
    wanted = dataclasses.replace(config, precision=dataclasses.replace(config.precision, name="bf16"))
    assert "precision=bf16 needs one" in gpu.judge_gpus(none, wanted, 1).text
    hosted = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="trtllm"))
    assert "rollout.engine=trtllm needs one" in gpu.judge_gpus(none, hosted, 1).text


def test_gpus_that_torch_does_not_see_are_a_failure(only_on_path):
    program(only_on_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100'")
    seen = dataclasses.replace(gpu.look(), devices=())
    assert seen.listed == 2
    assert "nvidia-smi lists 2, torch sees none" in gpu.judge_gpus(seen, None, 1).text


def test_more_ranks_than_gpus_are_a_failure_and_mixed_gpus_a_warning():
    assert gpu.judge_gpus(Gpus((H100, H100), "13.0", 2), None, 2).level == "ok"
    assert (
        "4 ranks on this machine, but only 2 x NVIDIA H100"
        in gpu.judge_gpus(Gpus((H100,) * 2, "13.0", 2), None, 4).text
    )
    assert gpu.judge_gpus(Gpus((H100, A100), "13.0", 2), None, 2).level == "warning"


@pytest.mark.parametrize(
    ("devices", "cuda", "able", "reason"),
    [
        ((H100,), "13.0", {"fp8_tensorwise", "fp8_blockwise", "fp8_delayed"}, ""),
        ((H100,), "12.8", {"fp8_tensorwise", "fp8_delayed"}, "fp8_blockwise needs CUDA 12.9, torch is built for 12.8"),
        ((L40,), "13.0", {"fp8_tensorwise", "fp8_delayed"}, "needs compute capability 9.0, NVIDIA L40S has 8.9"),
        ((H100, A100), "13.0", set(), "needs compute capability 8.9, NVIDIA A100 has 8.0"),
        ((H100, B200), "13.0", {"fp8_tensorwise", "fp8_delayed"}, "NVIDIA B200 has newer formats"),
        ((), None, set(), "no GPU, no FP8"),
    ],
)
def test_fp8_depends_on_the_weakest_gpu_the_newest_one_and_cuda(config, devices, cuda, able, reason):
    gpus = Gpus(devices, cuda, None)
    found = gpu.judge_fp8(gpus, None)
    assert found.level == "ok"
    assert reason in found.text
    for name in ("fp8_tensorwise", "fp8_blockwise", "fp8_delayed"):
        chosen = dataclasses.replace(config, precision=dataclasses.replace(config.precision, name=name))
        judged = gpu.judge_fp8(gpus, chosen)
        assert (judged.level == "ok") == (name in able), name
        assert judged.level == "ok" or (f"precision={'bf16' if devices else 'fp32'}" in judged.remedy)


@pytest.mark.parametrize(
    ("version", "body", "level", "text"),
    [
        ("2.11.0", "", "ok", "2.11.0 imports"),
        ("2.11.0", "raise ImportError('undefined symbol: _ZN2at')", "failure", "does not import: undefined symbol"),
        ("2.11.0", "import os; os.kill(os.getpid(), 11)", "failure", "died by SIGSEGV"),
        ("1.13", "", "failure", "takes >= 2.9, < 2.12"),
    ],
)
def test_a_library_that_does_not_import_is_a_failure_even_if_it_takes_the_process_along(
    tmp_path, monkeypatch, version, body, level, text
):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text(body)
    distribution(tmp_path, "transformer_engine", version)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = run_guarded(check("transformer_engine"), context())
    assert (found.level, text in found.text) == (level, True), found


def test_a_broken_apex_is_a_failure_and_none_is_fine(tmp_path, monkeypatch):
    assert gpu.apex(context()).level == "ok"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text("import amp_C_that_is_not_there")
    distribution(tmp_path, "apex", "0.1")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = run_guarded(check("apex"), context())
    assert found.level == "failure"
    assert "No module named 'amp_C_that_is_not_there'" in found.text


def test_transformer_engine_is_missed_where_the_precision_needs_it(config):
    assert gpu.transformer_engine(context(config)).level == "ok"
    wanted = dataclasses.replace(config, precision=dataclasses.replace(config.precision, name="bf16"))
    assert gpu.transformer_engine(context(wanted)).level == "failure"


def test_tensorrt_llm_is_held_against_its_contract(config, tmp_path, monkeypatch):
    from tests.engines.trtllm.test_check import FILES

    hosted = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="trtllm"))
    assert gpu.tensorrt_llm(context(config)).level == "ok"
    assert gpu.tensorrt_llm(context(hosted)).level == "failure"
    for name, text in FILES.items():
        path = tmp_path / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu.tensorrt_llm(context(hosted)).text == f"version {contract.VERSION} is as the contract says"
    path = tmp_path / "tensorrt_llm" / "_torch" / "async_llm.py"
    path.write_text(path.read_text().replace("async def resume", "async def wake_up"))
    found = gpu.tensorrt_llm(context(hosted))
    assert found.level == "failure"
    assert "async_llm.py" in found.text
    assert gpu.tensorrt_llm(context(config)).level == "warning"


GPU_FIELDS = {"bias_activation_fusion": True, "apply_rope_fusion": True}
WITH_ALL = Libraries(True, "2.11.0", "transformer_engine", True, "2.8", "91002")


def kernels(there: Libraries, **more) -> dict[str, tuple[bool, str]]:
    from nemo_aapo.mcore import precision

    fields = {**GPU_FIELDS, "transformer_layer_spec": precision.transformer_engine_layer_spec}
    return {
        kernel.name: (kernel.in_use, str(kernel) + kernel.remedy) for kernel in fused_kernels(fields, there, **more)
    }


def test_kernels_say_what_computes_and_why_no_fused_one_does():
    found = kernels(WITH_ALL)
    assert all(in_use for in_use, _ in found.values()), found
    assert "flash-attn 2.8 or cuDNN 91002" in found["attention"][1]
    found = kernels(WITH_ALL, environment={"NVTE_FLASH_ATTN": "0"})
    assert "flash-attn" not in found["attention"][1]
    off = {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}
    in_use, text = kernels(WITH_ALL, environment=off)["attention"]
    assert not in_use
    assert "NVTE_FLASH_ATTN=0 and NVTE_FUSED_ATTN=0" in text
    assert "25% of it on the host" in kernels(WITH_ALL, offloaded=0.25)["Adam"][1]
    bare = kernels(Libraries(True, None, "torch", False, None, "91002"))
    assert {name for name, (in_use, _) in bare.items() if in_use} == {"SwiGLU"}  # torch compiles that one
    assert all("install TransformerEngine" in text for name, (_, text) in bare.items() if name != "SwiGLU")


def test_on_this_machine_the_kernels_are_what_mcore_decided(config):
    import torch

    if torch.cuda.is_available():
        pytest.skip("the CPU's kernels are looked at")
    found = run_guarded(check("kernels"), context(config))
    assert [finding.name.removeprefix("kernel ") for finding in found] == list(kernels(WITH_ALL))
    assert all(finding.level == "ok" and finding.text.endswith(": no GPU") for finding in found)


# ---------------------------------------------------------------- Slurm and ports


def test_no_slurm_is_fine_unless_the_run_is_for_one(only_on_path, config):
    assert slurm.slurm_tools(context(config)).level == "ok"
    there = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, kind="slurm"))
    assert slurm.slurm_tools(context(there)).level == "failure"


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


def test_a_directory_that_cannot_be_written_is_a_failure(config):
    nowhere = dataclasses.replace(config, run=dataclasses.replace(config.run, dir="/proc/aapo"))
    found = files.file_system(context(nowhere))
    assert found.level == "failure"
    assert found.text.startswith("/proc can't be written")


def test_a_run_directory_of_another_run_is_a_failure(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"digest": "other", "settings": {}}))
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


def test_memory_is_held_against_the_plan_and_its_lower_bound(config):
    weights = sizes.count_parameters(Path(config.model.path)) * 4
    training = memory.plan(sizes.on_this_machine(config), 2**30).phases["train"]
    assert [training[part] for part in memory.DEVICE_PARTS] == [weights, weights, 2 * weights]
    gib = 2**30
    assert memory.judge("gpu_memory", 50 * gib, 80 * gib, "weights", peak=70 * gib).level == "ok"
    assert memory.judge("gpu_memory", 50 * gib, 80 * gib, "weights", peak=90 * gib).level == "warning"
    assert memory.judge("gpu_memory", 90 * gib, 80 * gib, "weights", peak=95 * gib).level == "failure"


def test_memory_of_a_container_counts_and_too_little_is_a_failure(config, tmp_path, monkeypatch):
    assert all(finding.level == "ok" for finding in memory.memory(context(config)))
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert memory.free_host_memory(tmp_path) == 2**20 - 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_memory(tmp_path) > 2**20
    monkeypatch.setattr(memory, "free_host_memory", lambda: 2**20)
    (found,) = memory.memory(context(config))
    assert (found.name, found.level) == ("host_memory", "failure")


# ---------------------------------------------------------------- model, tokenizer, rewards


def test_a_whole_model_directory_is_ok_and_a_broken_one_is_named(config, tiny_models, tmp_path):
    assert "Qwen2ForCausalLM, 4 layers" in model.model(context(config)).text
    assert "no chat template" in model.tokenizer(context(config)).text
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], copy)
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(copy)))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "where its header promises" in failure("model", broken)
    for file in copy.glob("*token*"):
        file.unlink()
    assert "no tokenizer here" in failure("tokenizer", broken)


def test_a_layout_that_does_not_divide_the_model_is_a_failure(config):
    cut = dataclasses.replace(config, model=dataclasses.replace(config.model, tensor_model_parallel_size=3))
    assert "tensor_model_parallel_size=3 does not divide" in failure("model", cut)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_a_failure(config, tiny_models, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "vocab_size": 90}))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(copy)))
    assert model.tokenizer(context(other)).text == "has 97 tokens, the model's vocabulary 90"


def test_reward_workers_tell_right_from_wrong_and_a_hostile_one_is_killed(tiny_models, tmp_path):
    every = [{"name": name, "weight": 1.0} for name in ("accuracy", "integer", "exact", "format")]
    config = make_config(tiny_models["qwen2"], rewards=[*every, {"name": "cosine", "max_tokens": 8}])
    found = rewards.rewards(context(config))
    assert found.level == "ok", found
    assert found.text.startswith("accuracy 1 for right, 0 for wrong, integer 1 for right, 0 for wrong")
    assert found.text.endswith("(1 worker); one that never ends is killed in time")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("import time; time.sleep(60)", "right answer could not be scored: timeout"),
        ("raise KeyError('url')", "right answer could not be scored: error: KeyError"),
    ],
)
def test_a_reward_that_hangs_or_raises_is_a_failure(tiny_models, tmp_path, body, text):
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(prompt, completion, answer, **info):\n    {body}\n")
    entry = {"name": "custom", "function": f"{path}:mine"}
    config = make_config(tiny_models["qwen2"], rewards=[entry], validation__reward="mine", reward_runner__timeout_s=1.0)
    assert text in failure("rewards", config)


def test_a_reward_that_prefers_the_wrong_answer_is_a_failure(tiny_models):
    upside_down = {"name": "cosine", "max_tokens": 8, "correct_short": -1.0, "verifier": "integer"}
    config = make_config(tiny_models["qwen2"], rewards=[upside_down], validation__reward="cosine")
    assert "for the right answer" in failure("rewards", config)


# ---------------------------------------------------------------- the catalogue


def check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


def failure(name: str, config) -> str:
    """What a check says that fails."""
    (found,) = run_guarded(check(name), context(config))
    assert found.level == "failure", found
    return found.text


def test_checks_are_chosen_by_name():
    assert [c.name for c in select(["gpu", "disk"], ["disk"], quick=False)] == ["gpu"]
    assert all(not c.needs_config for c in select([], [], quick=True))
    with pytest.raises(ConfigError, match="there is no check 'gpus'"):
        select(["gpus"], [], quick=False)
    with pytest.raises(ConfigError, match="no check is left"):
        select(["parity"], [], quick=True)
