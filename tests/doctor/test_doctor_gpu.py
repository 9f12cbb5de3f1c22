"""The doctor's checks of GPUs, precisions, libraries and kernels."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.doctor.checks import gpu
from nemo_aapo.doctor.checks.gpu import Gpu, Gpus
from nemo_aapo.doctor.guard import run_guarded
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.mcore.kernels import Libraries, fused_kernels
from tests.doctor.contexts import check, context, distribution, program
from tests.engines.trtllm.package_text import FILES, write_package

B200 = Gpu("NVIDIA B200", (10, 0), 180 * 2**30)
H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
A100 = Gpu("NVIDIA A100", (8, 0), 80 * 2**30)
L40 = Gpu("NVIDIA L40S", (8, 9), 48 * 2**30)


def test_a_machine_without_gpu_is_ok_unless_the_configuration_needs_one(config):
    none = Gpus((), None, None)
    assert gpu.judge_gpus(none, None, 1).level == "ok"
    assert gpu.judge_gpus(none, config, 1).level == "ok"
    assert gpu.judge_gpus(dataclasses.replace(none, cuda="13.0"), config, 1).level == "warning"
    wanted = dataclasses.replace(config, precision=dataclasses.replace(config.precision, name="bf16"))
    assert "precision=bf16 needs one" in gpu.judge_gpus(none, wanted, 1).text
    hosted = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="trtllm"))
    assert "rollout.engine=trtllm needs one" in gpu.judge_gpus(none, hosted, 1).text


@pytest.mark.slow
def test_gpus_that_torch_does_not_see_are_a_failure(only_on_path):
    program(only_on_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100'")
    seen = dataclasses.replace(gpu.find_gpus(), devices=())
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "body", "level", "text"),
    [
        ("2.11.0", "", "ok", "2.11.0 imports"),
        ("2.11.0", "raise ImportError('undefined symbol: _ZN2at')", "failure", "does not import: undefined symbol"),
        ("2.11.0", "import os; os.kill(os.getpid(), 11)", "failure", "died by SIGSEGV"),
        ("1.13", "", "failure", "take >= 2.10, < 2.12"),
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


@pytest.mark.slow
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
    hosted = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="trtllm"))
    assert gpu.tensorrt_llm(context(config)).level == "ok"
    assert gpu.tensorrt_llm(context(hosted)).level == "failure"
    write_package(tmp_path, FILES)
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        gpu.tensorrt_llm(context(hosted)).text
        == f"version {contract.VERSION} is as the contract with {contract.VERSION} says"
    )
    path = tmp_path / "tensorrt_llm" / "_torch" / "async_llm.py"
    path.write_text(path.read_text().replace("async def resume", "async def wake_up"))
    found = gpu.tensorrt_llm(context(hosted))
    assert found.level == "failure"
    assert "async_llm.py" in found.text
    assert gpu.tensorrt_llm(context(config)).level == "warning"


def test_ray_and_torchs_allocator_are_judged_by_whether_the_engine_needs_them(config, monkeypatch):
    levels = {
        (wanted, version): gpu.judge_ray("it lacks a name" if version != "2.54.0" else "", version, wanted).level
        for wanted in (False, True)
        for version in (None, "2.60.0", "2.54.0")
    }
    assert list(levels.values()) == ["ok", "warning", "ok", "failure", "failure", "ok"]
    assert "ray==2.54.0" in gpu.judge_ray("it lacks a name", "2.60.0", True).remedy
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    wanted = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="trtllm"))
    assert gpu.allocator(context(config)).level == "ok"
    assert gpu.allocator(context(wanted)).level == "failure"
    shared = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="remote", refit="ipc"))
    for there, level in ((False, "ok"), (True, "failure")):  # without a GPU weights lie in files' memory
        monkeypatch.setattr(gpu, "has_gpu", lambda there=there: there)
        assert gpu.allocator(context(shared)).level == level
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert gpu.allocator(context(wanted)).level == "ok"


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


@pytest.mark.slow
def test_on_this_machine_the_kernels_are_what_mcore_decided(config):
    import torch

    if torch.cuda.is_available():
        pytest.skip("the CPU's kernels are looked at")
    found = run_guarded(check("kernels"), context(config))
    assert [finding.name.removeprefix("kernel ") for finding in found] == list(kernels(WITH_ALL))
    assert all(finding.level == "ok" and finding.text.endswith(": no GPU") for finding in found)
