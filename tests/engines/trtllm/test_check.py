"""The contract's checker against a small package of TensorRT-LLM's form, and against a real one where there is one.

The package is written here: relative and star imports, re-exports, pydantic and dataclass fields, enumerations.
"""

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

ARGS = '''
from pydantic import BaseModel as PydanticBaseModel, Field as PydanticField
from enum import Enum
from strenum import StrEnum
raise ImportError("this module must not be imported")

def Field(default=..., *, status=None, **kwargs):
    return PydanticField(default, **kwargs)

class StrictBaseModel(PydanticBaseModel):
    pass

@PybindMirror.mirror_pybind_fields(_KvCacheConfig)
class KvCacheConfig(StrictBaseModel, PybindMirror):
    """Configuration."""
    enable_block_reuse: bool = Field(default=True, description="x")
    max_tokens: Optional[int] = Field(None, description="x")
    free_gpu_memory_fraction: Optional[float] = Field(
        default=0.9, ge=0, le=1)

class LoadFormat(Enum):
    AUTO = 0

class SamplerType(StrEnum):
    TRTLLMSampler = "TRTLLMSampler"
    TorchSampler = "TorchSampler"
    auto = "auto"

class BaseLlmArgs(StrictBaseModel):
    model_config = ConfigDict(extra="forbid")
    model: Union[str, Path] = Field(description="The path")
    skip_tokenizer_init: bool = Field(default=False)
    tensor_parallel_size: int = Field(default=1)
    dtype: str = Field(default="auto")
    load_format: Literal['auto', 'dummy'] = Field(default='auto')
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    max_input_len: Optional[int] = Field(default=1024)
    max_seq_len: Optional[int] = Field(default=None)
    max_num_tokens: Optional[int] = Field(default=8192)

class TorchLlmArgs(BaseLlmArgs):
    sampler_type: Union[str, SamplerType] = Field(default=SamplerType.auto)
    load_format: Union[str, LoadFormat] = Field(default=LoadFormat.AUTO)
    ray_worker_extension_cls: Optional[str] = Field(default=None)
    enable_sleep: bool = Field(default=False, status="prototype")
'''
FILES = {
    "__init__.py": "raise ImportError('libcuda')\n",
    "version.py": f'__version__ = "{contract.VERSION}"\n',
    "_utils.py": 'def mpi_disabled() -> bool:\n    return os.environ.get("TLLM_DISABLE_MPI") == "1"\n',
    "_torch/__init__.py": "",
    "_torch/async_llm.py": """
from ..llmapi.llm import LLM

class AsyncLLM(LLM):
    def __init__(self, placement_groups=None, *args, **kwargs):
        super().__init__(*args, **kwargs)

    async def setup_async(self):
        return self

    async def release(self, tags: list[str]):
        ...

    async def resume(self, tags: list[str]):
        ...

    async def update_weights(self, weights: dict[str, str]):
        ...

    async def collective_rpc(self, method: str, args: tuple = (), kwargs=None, unique_reply_rank=None):
        ...
""",
    "_torch/virtual_memory.py": """
class ExecutorMemoryType(StrEnum):
    SAMPLER = "sampler"
    DRAFTER = "drafter"
    GUIDED_DECODER = "guided_decoder"
    SPEC_RESOURCES = "spec_resource_manager"
    INIT_KV_CACHE = "_no_capture_init_kv_cache"
    MODEL_EXTRA = "model_extra"
    EXTRA_RESOURCES = "executor_extra"
    KV_CACHE = "kv_cache"
    MODEL_ENGINE_MAIN = "model"
    MODEL_ENGINE_DRAFT = "draft_model"
""",
    "_torch/models/modeling_utils.py": 'os.environ.get("TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL", "False")\n',
    "_torch/pyexecutor/py_executor.py": "class PyExecutor:\n    def reset_prefix_cache(self):\n        ...\n",
    "llmapi/__init__.py": "from .llm_args import *\n",
    "llmapi/llm_args.py": ARGS,
    "llmapi/llm.py": """
from ..executor import DetokenizedGenerationResultBase, GenerationResult
from .utils import set_api_status

class RequestOutput(DetokenizedGenerationResultBase, GenerationResult):
    pass

class BaseLLM:
    def __init__(self, model, tokenizer=None, **kwargs):
        ...

    @nvtx_range_debug("LLM.generate_async")
    def generate_async(
        self, inputs: PromptInputs, sampling_params: Optional[SamplingParams] = None,
        lora_request: Optional[LoRARequest] = None, streaming: bool = False,
    ) -> RequestOutput:
        ...

    def shutdown(self) -> None:
        ...

class _TorchLLM(BaseLLM):
    pass

class LLM(_TorchLLM):
    pass
""",
    "llmapi/rlhf_utils.py": """
class WorkerExtension:
    @control_action_decorator
    def update_weights(self, ipc_handles: Optional[dict] = None):
        ...
""",
    "executor/__init__.py": "from .request import *\nfrom .result import *\n",
    "executor/request.py": "class GenerationRequest:\n    pass\n",
    "executor/result.py": """
@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: Optional[int] = None

@dataclass(slots=True)
class CompletionOutput:
    index: int
    token_ids: Optional[List[int]] = field(default_factory=list)
    logprobs: Optional[list] = field(default_factory=list)
    finish_reason: Optional[Literal['stop', 'length', 'timeout', 'cancelled']] = None

class GenerationResultBase:
    @property
    def outputs(self) -> List[CompletionOutput]:
        ...

class DetokenizedGenerationResultBase(GenerationResultBase):
    pass

class GenerationResult(GenerationResultBase):
    pass
""",
    "executor/ray_executor.py": 'if os.environ.get("TLLM_RAY_FORCE_LOCAL_CLUSTER", "0") != "1":\n    pass\n',
    "executor/ray_gpu_worker.py": """
try:
    import ray
except ModuleNotFoundError:
    raise
else:
    @ray.remote
    class RayWorkerWrapper:
        def report_device_id(self) -> str:
            ...

        def call_worker_method(self, method_name: str, *args, **kwargs):
            ...
""",
    "sampling_params.py": """
@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: Optional[int] = None
    pad_id: Optional[int] = None
    max_tokens: int = 32
    stop_token_ids: Optional[List[int]] = None
    include_stop_str_in_output: bool = False
    _stop_word_ids: Optional[List[List[int]]] = field(default=None, init=False, repr=False)
    n: int = 1
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    seed: Optional[int] = None
    temperature: Optional[float] = None
    logprobs: Optional[int] = None
    ignore_eos: bool = False
    detokenize: bool = True
""",
}
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
    ("llmapi/llm_args.py", "    enable_sleep:", "    sleep_config:", "TorchLlmArgs has no field enable_sleep"),
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


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


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
        named = re.match(r"\w+\.(\w+)|(\w+) has no", text)
        if named:  # the line that it names is the member's, or the class's that has none
            name, line = place.split(":")
            assert (named[1] or named[2]) in files[name.removeprefix("tensorrt_llm/")].splitlines()[int(line) - 1]
        else:
            assert place == f"tensorrt_llm/{file}:1"


def test_every_name_of_the_contract_is_held_by_the_check(tmp_path):
    """Without its class each entry is missed: none is there that nobody looks at."""
    empty = dict.fromkeys(FILES, "")
    found = trtllm_check.compare(trtllm_check.Package(write_package(tmp_path, empty), "tensorrt_llm"))
    assert {f"no class {cls.name}" for cls in contract.CLASSES} <= {difference.text for difference in found}
    assert len(found) == len(contract.CLASSES) + len(contract.ENVIRONMENT_READERS)


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
