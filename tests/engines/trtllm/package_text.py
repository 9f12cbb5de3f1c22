"""The text of a small package of TensorRT-LLM's form, which keeps the contract: nothing in it is run.

Relative and star imports, re-exports, pydantic and dataclass fields, enumerations.
"""

from __future__ import annotations

import re
from pathlib import Path

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

class CudaGraphConfig(StrictBaseModel):
    batch_sizes: Optional[List[int]] = Field(default=None, description="x")
    max_batch_size: int = Field(default=0, description="x")
    enable_padding: bool = Field(default=False, description="x")

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
    max_batch_size: Optional[int] = Field(default=None)
    trust_remote_code: bool = Field(default=False)

class TorchLlmArgs(BaseLlmArgs):
    cuda_graph_config: Optional[CudaGraphConfig] = Field(default_factory=CudaGraphConfig)
    allreduce_strategy: Optional[Literal['AUTO', 'NCCL']] = Field(default='AUTO')
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
    "_torch/pyexecutor/py_executor.py": """
class PyExecutor:
    @contextmanager
    def control_action(self):
        ...

    def reset_prefix_cache(self):
        ...
""",
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
        if ipc_handles is None:
            self.engine.reset_prefix_cache()
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
    def abort(self) -> None:
        ...
""",
    "executor/base_worker.py": 'os.environ.get("TLLM_NUMA_AWARE_WORKER_AFFINITY")\n',
    "executor/ray_executor.py": """
from ray.util.placement_group import PlacementGroupSchedulingStrategy
if os.environ.get("TLLM_RAY_FORCE_LOCAL_CLUSTER", "0") != "1":
    pass
""",
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


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def generation(number: int) -> dict[str, str]:
    """The package as later releases have it: 1.3 (1), and main in August 2026, 1.4 (2).

    Facts of the sources, and not of the contract: ``AsyncLLM`` has the methods of pull request 12272 and of the newest
    ``async_llm.py``; ``ExecutorMemoryType`` is imported beside ``SleepConfig`` from ``llm_args.py``, and
    ``virtual_memory.py`` at commit 0657386 has none; its members are those of a version between. The newest
    ``executor/ray/gpu_worker.py`` is of commit 00be09f, its ``executor.py`` of 061a914; pull request 18232 removed
    ``sampler_type``.
    """
    files = dict(FILES)
    tags = files["_torch/virtual_memory.py"] + MORE_TAGS
    files["_torch/virtual_memory.py"] = "class _MultiPoolProxy:\n    pass\n"
    files["_torch/async_llm.py"] += PAUSING
    sleep = "    sleep_config: Optional[SleepConfig] = Field(default=None)"
    args = "\n".join(sleep if "enable_sleep" in line else line for line in ARGS.splitlines())
    files["llmapi/llm_args.py"] = args + tags + SLEEP
    if number == 1:
        return files
    files["llmapi/llm_args.py"] = re.sub(r".* sampler_type: .*\n", "", files["llmapi/llm_args.py"])
    files["_torch/async_llm.py"] = files["_torch/async_llm.py"].replace("tags: list[str]", "tags=None")
    del files["executor/ray_executor.py"]
    actor = files.pop("executor/ray_gpu_worker.py").replace(
        "        def ", "        @ensure_distributed_setup\n        def "
    )
    drains = files["_torch/pyexecutor/py_executor.py"].replace(
        "control_action(self)", "control_action(self, drain=True)"
    )
    return {
        **files,
        "_torch/pyexecutor/py_executor.py": drains,
        "executor/ray/__init__.py": "",
        "executor/ray/executor.py": RAY_EXECUTOR,
        "executor/ray/gpu_worker.py": actor,
    }


MORE_TAGS = """
    INIT_EXTRA_RESOURCES = "_no_capture_init_extra_resources"
    MODEL_WEIGHTS_MAIN = "model_weights"
    MODEL_WEIGHTS_DRAFT = "draft_model_weights"
"""
SLEEP = """
class SleepConfig(StrictBaseModel):
    restore_modes: Dict[ExecutorMemoryType, str] = Field(default_factory=dict)
"""
PAUSING = """
    def generate_async(self, *args, **kwargs):
        return super().generate_async(*args, **kwargs)

    async def pause_generation(self) -> None:
        ...

    async def resume_generation(self) -> None:
        ...
"""
RAY_EXECUTOR = """
from ray.util.placement_group import placement_group
try:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError:
    from ray.util.placement_group import PlacementGroupSchedulingStrategy
"""
