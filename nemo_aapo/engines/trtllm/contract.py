"""What the adapter relies on in TensorRT-LLM, as data: names, parameters, defaults, of three generations of releases.

Only what is used stands here. ``check.py`` compares it with a real package without importing it, and the
tests' stand-in for the library is made of it: the adapter can't use an argument that isn't on this page.

The facts were read in the library's public sources around the releases (docs/guide/tensorrt_llm.md says which).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

VERSION = "1.2.1"
"""The release of TensorRT-LLM that the image has, and the first contract is of."""
RAY_VERSION = "2.54.0"
"""The release of Ray that was seen to have what TensorRT-LLM 1.2 imports of it; 2.60.0 no longer has it."""


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
ABSENT = SourceText("<absent>")
"""A field that later releases no longer have."""
ANY = SourceText("<any>")
"""A field that is always given: whatever its default, nothing rests on it."""


@dataclass(frozen=True)
class Method:
    """A method that is called."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Name -> default, of the parameters that are passed or whose default is relied on."""
    coroutine: bool = False
    """True: ``async def``, so that it must be awaited."""
    decorators: tuple[str, ...] = ()
    """Decorators whose effect is relied on."""
    calls: tuple[str, ...] = ()
    """Names of what its body must call."""


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
    closed: bool = False
    """True: the enumeration has no other public values; one that begins with ``_`` is private."""
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
        "trust_remote_code": False,
        "max_batch_size": ANY,
        "cuda_graph_config": ANY,
        "allreduce_strategy": ANY,
    },
)
CUDA_GRAPH_CONFIG = LibraryClass(
    "tensorrt_llm.llmapi.llm_args",
    "CudaGraphConfig",
    fields={"batch_sizes": None, "max_batch_size": 0, "enable_padding": False},
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
REQUEST_OUTPUT = LibraryClass("tensorrt_llm.llmapi.llm", "RequestOutput", attributes=("outputs", "abort"))
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
    methods={
        "update_weights": Method(
            {"ipc_handles": None}, decorators=("control_action_decorator",), calls=("reset_prefix_cache",)
        )
    },
)
RAY_WORKER = LibraryClass(
    "tensorrt_llm.executor.ray_gpu_worker",
    "RayWorkerWrapper",
    methods={"report_device_id": Method(), "call_worker_method": Method({"method_name": REQUIRED})},
)
EXECUTOR = LibraryClass(
    "tensorrt_llm._torch.pyexecutor.py_executor",
    "PyExecutor",
    methods={"reset_prefix_cache": Method(), "control_action": Method(decorators=("contextmanager",))},
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
"""Tags of all memory that can be released in 1.2, but for the KV cache; the adapter asks the library for them."""
MEMORY_TAGS = LibraryClass(
    "tensorrt_llm._torch.virtual_memory", "ExecutorMemoryType", values=(*WEIGHT_TAGS, KV_CACHE_TAG), closed=True
)

CLASSES = (
    ASYNC_LLM,
    LLM_ARGS,
    CUDA_GRAPH_CONFIG,
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
    # Unset, a worker leaves the cores that Slurm gave its task, and dies where the low CPU numbers are not among them
    # (base_worker.py: _configure_affinity; verl's pull request 5085).
    "TLLM_NUMA_AWARE_WORKER_AFFINITY": "0",
    # Ray ends workers when the node has used 95 % of its memory, which pinned copies of weights and the learner's own
    # processes may well take; and each cluster would keep 30 % of the free memory for objects, which here are handles.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(256 * 2**20),
}
"""Environment variables that are set before the library and Ray are imported, and stay."""
ENVIRONMENT_READERS = {
    "TLLM_DISABLE_MPI": "tensorrt_llm._utils",
    "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "tensorrt_llm._torch.models.modeling_utils",
    "TLLM_RAY_FORCE_LOCAL_CLUSTER": "tensorrt_llm.executor.ray_executor",
    "TLLM_NUMA_AWARE_WORKER_AFFINITY": "tensorrt_llm.executor.base_worker",
}
"""Environment variable -> the module of the library that reads it, in 1.2; later ones read many in one place."""
RAY_USERS = tuple(
    f"tensorrt_llm.executor.{name}" for name in ("ray_executor", "ray_gpu_worker", "ray.executor", "ray.gpu_worker")
)
"""Modules of the library that import names from Ray, of all generations."""
RAY_IMPORTS = LibraryClass("ray.util.placement_group", "PlacementGroupSchedulingStrategy")
"""What 1.2's modules import of Ray that not every Ray has."""


@dataclass(frozen=True)
class Contract:
    """What is relied on in one generation of releases."""

    version: str
    classes: tuple[LibraryClass, ...]
    readers: Mapping[str, str] = field(default_factory=dict)
    """As ``ENVIRONMENT_READERS``."""

    def find(self, name: str) -> LibraryClass | None:
        """The class of that name; None: there is none in this generation."""
        return next((cls for cls in self.classes if cls.name == name), None)

    @property
    def llm_args(self) -> Mapping[str, Any]:
        """Field -> default of what the engine takes."""
        found = self.find(LLM_ARGS.name)
        return found.fields if found else {}

    @property
    def methods(self) -> Mapping[str, Method]:
        """What the engine has."""
        found = self.find(ASYNC_LLM.name)
        return found.methods if found else {}


def _changed(classes: tuple[LibraryClass, ...], *new: LibraryClass, without: str = "") -> tuple[LibraryClass, ...]:
    """The classes with some in place of their namesakes, or added, and one left out."""
    merged = {cls.name: cls for cls in (*classes, *new)}
    return tuple(cls for name, cls in merged.items() if name != without)


def _args(**fields: Any) -> LibraryClass:
    """The engine's arguments with fields added, changed, or left out (``ABSENT``)."""
    merged = {**LLM_ARGS.fields, **fields}
    return replace(LLM_ARGS, fields={name: default for name, default in merged.items() if default is not ABSENT})


SLEEP_CONFIG = LibraryClass("tensorrt_llm.llmapi.llm_args", "SleepConfig", fields={"restore_modes": ANY})
"""Pull request 11889: it takes the place of ``enable_sleep``."""
PAUSING_ASYNC_LLM = replace(
    ASYNC_LLM,
    methods={
        **ASYNC_LLM.methods,
        "release": Method({"tags": ANY}, coroutine=True),  # required, and None in the newest async_llm.py
        "resume": Method({"tags": ANY}, coroutine=True),
        "pause_generation": Method(coroutine=True),
        "resume_generation": Method(coroutine=True),
    },
)
"""Pull request 12272: pausing ends all requests that are under way."""
SPLIT_MEMORY_TAGS = replace(
    MEMORY_TAGS,
    module="tensorrt_llm.llmapi.llm_args",
    values=(*MEMORY_TAGS.values, "model_weights", "draft_model_weights"),
)
"""Weights have tags of their own; they are imported beside ``SleepConfig`` (NeMo-RL's trtllm_worker_async.py, verl)."""
MOVED_RAY_WORKER = replace(RAY_WORKER, module="tensorrt_llm.executor.ray.gpu_worker")
"""As in executor/ray/gpu_worker.py at commit 00be09f."""

V1_2 = Contract(VERSION, CLASSES, ENVIRONMENT_READERS)
V1_3 = Contract(
    "1.3",
    _changed(
        CLASSES,
        _args(enable_sleep=ABSENT, sleep_config=None, sampler_type=ANY),
        SLEEP_CONFIG,
        PAUSING_ASYNC_LLM,
        SPLIT_MEMORY_TAGS,
    ),
)
V1_4 = Contract(  # pull request 18232: TorchSampler alone, which takes the seeds of requests since pull request 17172
    "1.4",
    _changed(
        V1_3.classes,
        _args(enable_sleep=ABSENT, sleep_config=None, sampler_type=ABSENT),
        MOVED_RAY_WORKER,
        without="SamplerType",
    ),
)
CONTRACTS = (V1_2, V1_3, V1_4)


def contract_of(fields: Collection[str]) -> Contract:
    """The contract of a package, by the names of the arguments that its engine takes; the first if it fits none."""
    return next((contract for contract in CONTRACTS if contract.llm_args.keys() <= set(fields)), V1_2)
