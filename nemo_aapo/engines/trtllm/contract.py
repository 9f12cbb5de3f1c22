"""What the adapter (engine.py) relies on in TensorRT-LLM 1.2.1, as data: names, parameters, defaults.

Only what is used stands here. ``check.py`` compares it with a real package without importing it, and the
tests' stand-in for the library is made of it: the adapter can't use an argument that isn't on this page.

The facts were read in the library's public sources around that release (docs/guide/tensorrt_llm.md says which).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = "1.2.1"
"""The release of TensorRT-LLM that the contract is of."""


@dataclass(frozen=True)
class SourceText:
    """The source text of a default that is no literal, or the absence of a default.

    Example: ``SourceText("SamplerType.auto")``
    """

    text: str

    def __repr__(self) -> str:
        return self.text


REQUIRED = SourceText("<required>")
"""A parameter or field without a default."""
FACTORY = SourceText("<default_factory>")
"""A field whose default is made afresh each time."""


@dataclass(frozen=True)
class Method:
    """A method that is called."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Name -> default, of the parameters that are passed or whose default is relied on."""
    coroutine: bool = False
    """True: ``async def``, so that it must be awaited."""


@dataclass(frozen=True)
class LibraryClass:
    """A class that is used; its members may be inherited.

    Example: ``LibraryClass("tensorrt_llm.llmapi.llm", "RequestOutput", attributes=("outputs",))``
    """

    module: str
    """Dotted name of the module that it is imported from."""
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Pydantic or dataclass field -> default."""
    methods: Mapping[str, Method] = field(default_factory=dict)
    """Methods that are called."""
    attributes: tuple[str, ...] = ()
    """Fields, properties or methods that are read from its objects."""
    values: tuple[str, ...] = ()
    """The values of an enumeration's members that are passed or met."""
    literals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> all words of its ``Literal`` annotation."""


ASYNC_LLM = LibraryClass(
    "tensorrt_llm._torch.async_llm",
    "AsyncLLM",
    methods={
        "setup_async": Method(coroutine=True),
        "generate_async": Method({"inputs": REQUIRED, "sampling_params": None, "streaming": False}),
        "release": Method({"tags": REQUIRED}, coroutine=True),
        "resume": Method({"tags": REQUIRED}, coroutine=True),
        "update_weights": Method({"weights": REQUIRED}, coroutine=True),
        "collective_rpc": Method({"method": REQUIRED, "args": ()}, coroutine=True),
        "shutdown": Method(),
    },
)
LLM_ARGS = LibraryClass(  # what AsyncLLM's keyword arguments become; unknown ones raise
    "tensorrt_llm.llmapi.llm_args",
    "TorchLlmArgs",
    fields={
        "model": REQUIRED,
        "skip_tokenizer_init": False,
        "tensor_parallel_size": 1,
        "dtype": "auto",
        "kv_cache_config": FACTORY,
        "max_input_len": 1024,
        "max_seq_len": None,
        "max_num_tokens": 8192,
        "sampler_type": SourceText("SamplerType.auto"),
        "enable_sleep": False,
        "ray_worker_extension_cls": None,
        "load_format": SourceText("LoadFormat.AUTO"),
    },
)
KV_CACHE_CONFIG = LibraryClass(
    "tensorrt_llm.llmapi.llm_args",
    "KvCacheConfig",
    fields={"enable_block_reuse": True, "free_gpu_memory_fraction": 0.9, "max_tokens": None},
)
SAMPLER_TYPE = LibraryClass("tensorrt_llm.llmapi.llm_args", "SamplerType", values=("TRTLLMSampler",))
SAMPLING_PARAMS = LibraryClass(
    "tensorrt_llm.sampling_params",
    "SamplingParams",
    fields={
        "end_id": None,
        "pad_id": None,
        "max_tokens": 32,
        "stop_token_ids": None,
        "include_stop_str_in_output": False,
        "n": 1,
        "top_k": None,
        "top_p": None,
        "temperature": None,
        "seed": None,
        "logprobs": None,
        "ignore_eos": False,
        "detokenize": True,
    },
)
REQUEST_OUTPUT = LibraryClass("tensorrt_llm.llmapi.llm", "RequestOutput", attributes=("outputs",))
COMPLETION_OUTPUT = LibraryClass(
    "tensorrt_llm.executor.result",
    "CompletionOutput",
    attributes=("token_ids", "logprobs", "finish_reason"),
    literals={"finish_reason": ("stop", "length", "timeout", "cancelled")},
)
LOGPROB = LibraryClass("tensorrt_llm.executor.result", "Logprob", attributes=("logprob",))
WORKER_EXTENSION = LibraryClass(
    "tensorrt_llm.llmapi.rlhf_utils",
    "WorkerExtension",
    methods={"update_weights": Method({"ipc_handles": None})},
)
RAY_WORKER = LibraryClass(
    "tensorrt_llm.executor.ray_gpu_worker",
    "RayWorkerWrapper",
    methods={"report_device_id": Method(), "call_worker_method": Method({"method_name": REQUIRED})},
)
EXECUTOR = LibraryClass(
    "tensorrt_llm._torch.pyexecutor.py_executor", "PyExecutor", methods={"reset_prefix_cache": Method()}
)

KV_CACHE_TAG = "kv_cache"
WEIGHT_TAGS = (
    "sampler",
    "drafter",
    "guided_decoder",
    "spec_resource_manager",
    "model_extra",
    "executor_extra",
    "model",
    "draft_model",
)
"""Tags of all memory that can be released, but for the KV cache."""
MEMORY_TAGS = LibraryClass(
    "tensorrt_llm._torch.virtual_memory", "ExecutorMemoryType", values=(*WEIGHT_TAGS, KV_CACHE_TAG)
)

CLASSES = (
    ASYNC_LLM,
    LLM_ARGS,
    KV_CACHE_CONFIG,
    SAMPLER_TYPE,
    SAMPLING_PARAMS,
    REQUEST_OUTPUT,
    COMPLETION_OUTPUT,
    LOGPROB,
    WORKER_EXTENSION,
    RAY_WORKER,
    EXECUTOR,
    MEMORY_TAGS,
)

ENVIRONMENT = {
    "TLLM_DISABLE_MPI": "1",
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "1",
    "TLLM_RAY_FORCE_LOCAL_CLUSTER": "1",
}
"""Environment variables that are set before the library is imported, and stay."""
ENVIRONMENT_READERS = {
    "TLLM_DISABLE_MPI": "tensorrt_llm._utils",
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "tensorrt_llm._torch.models.modeling_utils",
    "TLLM_RAY_FORCE_LOCAL_CLUSTER": "tensorrt_llm.executor.ray_executor",
}
"""Environment variable -> the module of the library that reads it."""
