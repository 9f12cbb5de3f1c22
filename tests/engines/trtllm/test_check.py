"""The contract's checker against a small package of TensorRT-LLM's form, and against a real one where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_aapo.engines.trtllm import check as trtllm_check
from nemo_aapo.engines.trtllm import contract
from tests.engines.trtllm.package_text import FILES, generation, write_package

MUTATIONS = [
    # file, what stands there, what stands there instead, the difference (file and its beginning)
    ("llmapi/llm_args.py", "Field(default=1024)", "Field(default=2048)", "TorchLlmArgs.max_input_len: default 2048"),
    ("llmapi/llm_args.py", "Field(default=8192)", "Field(8192.0)", "TorchLlmArgs.max_num_tokens: default 8192.0"),
    ("llmapi/llm_args.py", "default=SamplerType.auto", "default='auto'", "TorchLlmArgs.sampler_type: default 'auto'"),
    (
        "llmapi/llm_args.py",
        "default_factory=KvCacheConfig",
        "default=None",
        "TorchLlmArgs.kv_cache_config: default None",
    ),
    ("llmapi/llm_args.py", "Field(None, desc", "Field(..., desc", "KvCacheConfig.max_tokens: default <required>"),
    ("llmapi/llm_args.py", "    enable_sleep:", "    sleeping:", "TorchLlmArgs has no field enable_sleep"),
    (
        "llmapi/llm_args.py",
        "class TorchLlmArgs(BaseLlmArgs)",
        "class TorchLlmArgs(Other)",
        "TorchLlmArgs has no field model",
    ),
    (
        "llmapi/llm_args.py",
        '= "TRTLLMSampler"',
        '= "other"',
        "SamplerType has no member with the value 'TRTLLMSampler'",
    ),
    ("_torch/virtual_memory.py", '"kv_cache"', '"kv"', "ExecutorMemoryType has no member with the value 'kv_cache'"),
    (
        "_torch/virtual_memory.py",
        'MODEL_EXTRA = "model_extra"',
        'MODEL_EXTRA = "model_extra"\n    WEIGHTS = "model_weights"',
        "ExecutorMemoryType has a member with the value 'model_weights'",
    ),
    (
        "llmapi/llm_args.py",
        "enable_padding: bool = Field(default=False",
        "enable_padding: bool = Field(default=True",
        "CudaGraphConfig.enable_padding: default True",
    ),
    ("llmapi/llm_args.py", "    allreduce_strategy:", "    allreduce:", "TorchLlmArgs has no field allreduce_strategy"),
    (
        "llmapi/rlhf_utils.py",
        "    @control_action_decorator\n    def update_weights",
        "    def update_weights",
        "WorkerExtension.update_weights: is not decorated by control_action_decorator",
    ),
    (
        "llmapi/rlhf_utils.py",
        "self.engine.reset_prefix_cache()",
        "pass",
        "WorkerExtension.update_weights: doesn't call reset_prefix_cache",
    ),
    (
        "executor/base_worker.py",
        "NUMA_AWARE_WORKER",
        "WORKER",
        "doesn't read the environment variable TLLM_NUMA_AWARE_WORKER_AFFINITY",
    ),
    ("_torch/async_llm.py", "class AsyncLLM", "class AsynchronousLLM", "no class AsyncLLM"),
    ("_torch/async_llm.py", "async def release", "def release", "AsyncLLM.release: is not a coroutine"),
    ("_torch/async_llm.py", "tags: list", "names: list", "AsyncLLM.release: no parameter tags"),
    (
        "_torch/async_llm.py",
        "weights: dict[str, str]",
        "weights, sweep",
        "AsyncLLM.update_weights: parameter sweep is req",
    ),
    ("_torch/async_llm.py", "args: tuple = ()", "args: tuple = None", "AsyncLLM.collective_rpc(args): default None"),
    (
        "llmapi/llm.py",
        "streaming: bool = False",
        "streaming: bool = True",
        "AsyncLLM.generate_async(streaming): default True",
    ),
    ("llmapi/llm.py", "def shutdown", "def close", "AsyncLLM has no method shutdown"),
    ("executor/__init__.py", "from .result import *", "", "RequestOutput has no attribute outputs"),
    ("executor/result.py", "'timeout', ", "", "CompletionOutput.finish_reason: one of ['cancelled', 'length', 'stop']"),
    ("executor/result.py", "    logprob: float", "    value: float", "Logprob has no attribute logprob"),
    (
        "executor/ray_executor.py",
        "FORCE_LOCAL",
        "LOCAL",
        "doesn't read the environment variable TLLM_RAY_FORCE_LOCAL_CL",
    ),
    ("sampling_params.py", "max_tokens: int = 32", "max_tokens: int = 64", "SamplingParams.max_tokens: default 64"),
    (
        "sampling_params.py",
        "detokenize: bool = True",
        "detokenize: int = 1",
        "SamplingParams.detokenize: default 1, the con",
    ),
    ("llmapi/rlhf_utils.py", None, None, "no such module; WorkerExtension was there"),
]


def as_wheel(folder: Path) -> Path:
    wheel = folder / f"tensorrt_llm-{contract.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(folder.rglob("*.py")):
            archive.write(path, path.relative_to(folder))
    return wheel


def run(capsys, *words: Path) -> tuple[int, list[str]]:
    code = trtllm_check.main([str(word) for word in words])
    return code, capsys.readouterr().out.splitlines()


def test_a_package_that_keeps_the_contract_passes_as_a_directory_and_as_a_wheel(tmp_path, capsys):
    folder = write_package(tmp_path, FILES)
    for path in (folder, folder / "tensorrt_llm", as_wheel(folder)):
        assert run(capsys, path) == (
            0,
            [f"{path}, version {contract.VERSION}: no differences from the contract with version {contract.VERSION}"],
        )


@pytest.mark.parametrize(("file", "there", "instead", "difference"), MUTATIONS, ids=[row[3][:60] for row in MUTATIONS])
def test_each_kind_of_difference_is_found_with_its_place(tmp_path, capsys, file, there, instead, difference):
    files = dict(FILES)
    if there is None:
        del files[file]
    else:
        assert there in files[file]
        files[file] = files[file].replace(there, instead, 1)
    folder = write_package(tmp_path, files)
    for path in (folder, as_wheel(folder)):
        code, lines = run(capsys, path)
        assert code == 1
        [(place, text)] = [line.split(": ", 1) for line in lines[:-1] if difference in line]
        assert text.startswith(difference)
        named = re.match(r"\w+\.(\w+)|(\w+) has (?:no|a) ", text)
        if named:  # the line that it names is the member's, or the class's that has none
            name, line = place.split(":")
            assert (named[1] or named[2]) in files[name.removeprefix("tensorrt_llm/")].splitlines()[int(line) - 1]
        else:
            assert place == f"tensorrt_llm/{file}:1"


def test_every_name_of_the_contract_is_held_by_the_check(tmp_path):
    """Without its class each entry is missed: none is there that nobody looks at."""
    empty = dict.fromkeys(FILES, "")
    found = trtllm_check.compare(trtllm_check.Package(write_package(tmp_path, empty), "tensorrt_llm"))
    assert {f"no class {cls.name}" for cls in contract.V1_2.classes} <= {difference.text for difference in found}
    assert len(found) == len(contract.V1_2.classes) + len(contract.V1_2.readers)


@pytest.mark.parametrize("number", [1, 2])
def test_a_later_package_is_held_against_the_contract_of_its_own_generation(tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(trtllm_check, "installed", lambda name: None)
    agreed = contract.CONTRACTS[number]
    path = write_package(tmp_path, generation(number))
    text = f"{path}, version {contract.VERSION}: no differences from the contract with version {agreed.version}"
    assert run(capsys, path) == (0, [text])
    assert trtllm_check.compare(trtllm_check.Package(path, "tensorrt_llm"))  # but not against 1.2's


def test_a_ray_without_what_the_package_imports_of_it_is_a_difference(tmp_path, monkeypatch):
    """Of the package that is there: 1.4 tries both places, so a start with it takes either Ray."""
    packages = {
        name: write_package(tmp_path / name, FILES if name == "1.2" else generation(2)) for name in ("1.2", "1.4")
    }
    ray = tmp_path / "ray"
    (ray / "util").mkdir(parents=True)
    (ray / "__init__.py").touch()
    strategy = "PlacementGroupSchedulingStrategy"
    (ray / "util" / "scheduling_strategies.py").write_text(f"class {strategy}:\n    pass\n")
    there: dict[str, Path] = {}
    monkeypatch.setattr(trtllm_check, "installed", lambda name="tensorrt_llm": there.get(name))
    assert trtllm_check.ray_difference() == "not installed"
    there["ray"] = ray
    for text, lacks in (
        ("import warnings\n", True),
        (f"from ray.util.scheduling_strategies import {strategy}\n", False),
    ):
        (ray / "util" / "placement_group.py").write_text(f"{text}def placement_group():\n    pass\n")
        there.pop("tensorrt_llm", None)
        assert (strategy in trtllm_check.ray_difference()) == lacks
        there["tensorrt_llm"] = packages["1.2"] / "tensorrt_llm"
        said = (
            f"tensorrt_llm/executor/ray_executor.py:2: imports {strategy} of ray.util.placement_group, which has none"
        )
        assert trtllm_check.ray_difference() == said * lacks
        there["tensorrt_llm"] = packages["1.4"] / "tensorrt_llm"
        assert trtllm_check.ray_difference() == ""


def test_where_there_is_no_package_the_command_says_so(tmp_path, capsys):
    assert run(capsys, tmp_path)[0] == 1
    assert run(capsys, tmp_path / "missing.whl")[0] == 1
    (tmp_path / "no.whl").write_text("not a wheel")
    assert run(capsys, tmp_path / "no.whl")[0] == 1
    if trtllm_check.installed() is None:
        said = "tensorrt_llm is not installed: name a wheel or a directory that holds tensorrt_llm/"
        assert run(capsys) == (1, [said])


@pytest.mark.slow
def test_the_command_finds_an_installed_package_without_importing_it(tmp_path):
    folder = write_package(tmp_path, FILES)  # its __init__ raises
    root = Path(trtllm_check.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "nemo_aapo.engines.trtllm.check"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no differences" in done.stdout


@pytest.mark.skipif("TRTLLM_PATH" not in os.environ, reason="TRTLLM_PATH names no TensorRT-LLM wheel or directory")
def test_the_real_package_keeps_the_contract():
    package = trtllm_check.Package(Path(os.environ["TRTLLM_PATH"]), "tensorrt_llm")
    assert not [str(difference) for difference in trtllm_check.compare(package)]
