"""What a TensorRT-LLM engine is made of: the run's settings, and what they become as arguments of the library."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.config import Config
from nemo_aapo.engines.trtllm.contract import KV_CACHE_TAG, LLM_ARGS, RAY_VERSION, VERSION
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.launch.world import Machine
from nemo_aapo.utils.safetensors import weight_files

if TYPE_CHECKING:
    from nemo_aapo.engines.trtllm.library import Library

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables by which torch's allocator is configured; the second is the newer name."""


def check(config: Config) -> None:
    """Refuse the engine on a machine that can't run it, without importing it.

    Raises:
        ConfigError: no TensorRT-LLM, no Ray or another one than it needs, no GPU, a precision that it doesn't compute
            in, or an allocator of torch's that shares no memory.
    """
    missing = []
    if importlib.util.find_spec("tensorrt_llm") is None:
        missing.append(f"the package tensorrt_llm (version {VERSION}; the Dockerfile's image has it)")
    if difference := ray_difference():
        missing.append(f"ray=={RAY_VERSION}, which AsyncLLM starts its workers by ({difference})")
    if not _has_gpu():
        missing.append("a CUDA GPU")
    if missing:
        raise ConfigError(
            f"TensorRT-LLM needs {' and '.join(missing)}, not found on this machine. rollout.engine=megatron, or "
            "rollout.server.engine=megatron of a server, needs neither"
        )
    check_allocator()
    if config.precision.name == "fp32":
        raise ConfigError("precision=fp32: rollout.engine=trtllm computes in bfloat16; use precision=bf16")


def check_allocator() -> None:
    """Refuse an allocator of torch's that shares no memory, and can't give it back piece by piece.

    Raises:
        ConfigError: names the variable.
    """
    if variable := expandable_segments(os.environ):
        raise ConfigError(
            f"{variable}={os.environ[variable]}: with expandable segments torch shares GPU memory by file descriptors, "
            "not by the handles that a refit of rollout.engine=trtllm or rollout.refit=ipc sends, and TensorRT-LLM's "
            f"sleep needs segments that it can unmap. Take expandable_segments out of {variable}"
        )


def ray_difference() -> str:
    """Why the installed Ray can't start the engine's workers; empty if it can."""
    from nemo_aapo.engines.trtllm import check as package_check  # it reads sources, which no other run needs

    return package_check.ray_difference()


def expandable_segments(environment: Mapping[str, str]) -> str:
    """The variable that switches torch's expandable segments on; empty: none does."""
    for variable in ALLOCATOR_VARIABLES:
        if "expandable_segments:true" in environment.get(variable, "").replace(" ", "").lower():
            return variable
    return ""


def _has_gpu() -> bool:
    return Machine.present().gpu is not None


@dataclass(frozen=True)
class TrtllmSettings:
    """What an engine is made of."""

    model_path: str
    """The base model's directory."""
    dtype: str
    """The dtype that it computes in, as the library names it: ``bfloat16``."""
    tensor_parallel_size: int
    """Number of its GPUs."""
    max_prompt_tokens: int
    """The longest prompt."""
    max_new_tokens: int
    """The longest completion."""
    max_concurrent_tokens: int
    """The most tokens in the KV cache."""
    kv_cache_fraction: float
    """The most that the KV cache takes of the GPU memory that is free at the start, from 0 to 1."""
    refit_bucket_bytes: int
    """Bytes of weights that are handed over at a time, unless one tensor alone is larger."""
    timeout_s: float
    """Seconds to wait for any one answer of the engine."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Setting -> temperature, of all that the run samples at; a server may be asked for others."""
    trust_remote_code: bool = False
    """The model's directory may bring code of its own."""
    reserved_bytes: int = 0
    """GPU memory of this rank that the learner will take after the engine's start, and keep while it generates."""

    @property
    def max_sequences(self) -> int:
        """The most sequences at a time: as many of the longest as the KV cache holds."""
        return max(1, self.max_concurrent_tokens // (self.max_prompt_tokens + self.max_new_tokens))

    @classmethod
    def from_config(cls, config: Config, reserved_bytes: int = 0) -> TrtllmSettings:
        """The settings that ``rollout`` and ``rollout.trtllm`` of a configuration say."""
        model, rollout = config.model, config.rollout
        learner_gpus = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        return cls(
            model_path=model.path,
            dtype="bfloat16",
            tensor_parallel_size=rollout.trtllm.tensor_parallel_size or learner_gpus,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            max_concurrent_tokens=rollout.max_concurrent_tokens,
            kv_cache_fraction=rollout.trtllm.kv_cache_fraction,
            refit_bucket_bytes=rollout.trtllm.refit_bucket_bytes,
            timeout_s=config.trainer.distributed_timeout_s,
            temperatures=_temperatures(config),
            trust_remote_code=model.trust_remote_code,
            reserved_bytes=reserved_bytes,
        )


def _temperatures(config: Config) -> dict[str, float]:
    validates = config.trainer.val_check_interval and config.validation.samples
    return {
        "rollout.temperature": config.rollout.temperature,
        **({"validation.temperature": config.validation.temperature} if validates else {}),
    }


def cache_fraction(fraction: float, gpus: Sequence[tuple[int, int]], directory: Path) -> float:
    """The share of free memory that leaves room for what the learner takes later: the library sizes its KV cache once.

    Args:
        fraction: of what is free after the engine's weights and what is reserved.
        gpus: (free bytes, bytes reserved) of each.
        directory: the model's, whose weights are cut over these GPUs.

    Raises:
        RunError: there is no room for a KV cache on one of them.
    """
    if not any(reserved for _, reserved in gpus):
        return fraction
    # Not all that lies there is the model: Mistral's directories have consolidated.safetensors beside the shards.
    engine_bytes = sum((directory / name).stat().st_size for name in weight_files(directory)) // len(gpus)
    shares = []
    for free, reserved in gpus:
        room = free - engine_bytes
        if reserved and room <= reserved:
            raise RunError(
                f"a GPU of the TensorRT-LLM engine has {free / 2**30:.1f} GiB free, of which its weights take "
                f"{engine_bytes / 2**30:.1f} and Adam's moments will take {reserved / 2**30:.1f}: set "
                "rollout.offload_learner=true, or cut the model over more GPUs"
            )
        shares.append((room - reserved) / room if reserved else 1.0)
    return fraction * min(shares)


def llm_arguments(
    settings: TrtllmSettings, library: Library, *, colocated: bool, worker_extension: str
) -> dict[str, Any]:
    """Keyword arguments of ``AsyncLLM``, of those that the installed library has.

    Args:
        colocated: the engine must be able to sleep.
        worker_extension: dotted name of a class.
    """
    known = library.contract.llm_args
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "tensor_parallel_size": settings.tensor_parallel_size,
        "dtype": settings.dtype,
        "kv_cache_config": library.kv_cache_config(
            enable_block_reuse=True,  # a prompt's keys and values serve all completions of its group
            free_gpu_memory_fraction=settings.kv_cache_fraction,
            max_tokens=settings.max_concurrent_tokens,
        ),
        "max_input_len": settings.max_prompt_tokens,  # trap: the default is 1024
        "max_seq_len": settings.max_prompt_tokens + settings.max_new_tokens,
        # One pass takes a prompt whole.
        "max_num_tokens": max(LLM_ARGS.fields["max_num_tokens"], settings.max_prompt_tokens),
        # Trap: the default is 2048, and the sampler keeps several [batch, vocabulary] tensors in float32.
        "max_batch_size": settings.max_sequences,
        # Trap: without padding only batches of the sizes that were captured replay a graph; all others run eagerly
        # (llm_args.py: CudaGraphConfig; verl and NeMo-RL pad as well).
        "cuda_graph_config": library.cuda_graph_config(enable_padding=True, max_batch_size=settings.max_sequences),
        # Trap: the library's own all-reduce diverges where several engines of more than one GPU share a node
        # (async_llm.py says so, and pull request 9793 tests it); verl asks for NCCL by name, too.
        "allreduce_strategy": "NCCL",
        "ray_worker_extension_cls": worker_extension,
    }
    if "sampler_type" in known:
        # Trap: the default, TorchSampler, ignores the seeds of requests in 1.2 and starts every engine at seed 42:
        # freshly started engines that are given the same prompts draw the same. This one gives each request a stream
        # of its own seed, whatever the engine; the engine checks at its start that it does.
        arguments["sampler_type"] = "TRTLLMSampler"
    if library.sleep_config is None:
        arguments["enable_sleep"] = colocated
    elif colocated:
        # Weights come back as they were: validation may wake the engine without a refit. The KV cache comes back empty.
        arguments["sleep_config"] = library.sleep_config(restore_modes={KV_CACHE_TAG: "NONE"})
    return arguments
