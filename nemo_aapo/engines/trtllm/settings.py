"""What a TensorRT-LLM engine is made of: the run's settings, and what they become as arguments of the library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.engines.trtllm.contract import LLM_ARGS, VERSION
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import Machine


def check(config: Config) -> None:
    """Refuse the engine on a machine that can't run it, without importing it.

    Raises:
        ConfigError: no TensorRT-LLM, no GPU, or a precision that it doesn't compute in.
    """
    missing = []
    if importlib.util.find_spec("tensorrt_llm") is None:
        missing.append(f"the package tensorrt_llm (version {VERSION}; the Dockerfile's image has it)")
    if not _has_gpu():
        missing.append("a CUDA GPU")
    if missing:
        raise ConfigError(
            f"rollout.engine=trtllm needs {' and '.join(missing)}, not found on this machine. "
            "rollout.engine=megatron needs neither: it draws from the learner's own weights"
        )
    if config.precision.name == "fp32":
        raise ConfigError("precision=fp32: rollout.engine=trtllm computes in bfloat16; use precision=bf16")


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

    @classmethod
    def from_config(cls, config: Config) -> TrtllmSettings:
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
        )


def llm_arguments(
    settings: TrtllmSettings, *, colocated: bool, worker_extension: str, kv_cache_config: Callable[..., Any]
) -> dict[str, Any]:
    """Keyword arguments of ``AsyncLLM``.

    Args:
        colocated: the engine must be able to sleep.
        worker_extension: dotted name of a class.
        kv_cache_config: the library's ``KvCacheConfig``.
    """
    return {
        "model": settings.model_path,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "tensor_parallel_size": settings.tensor_parallel_size,
        "dtype": settings.dtype,
        "kv_cache_config": kv_cache_config(
            enable_block_reuse=True,  # a prompt's keys and values serve all completions of its group
            free_gpu_memory_fraction=settings.kv_cache_fraction,
            max_tokens=settings.max_concurrent_tokens,
        ),
        "max_input_len": settings.max_prompt_tokens,  # trap: the default is 1024
        "max_seq_len": settings.max_prompt_tokens + settings.max_new_tokens,
        # One pass takes a prompt whole.
        "max_num_tokens": max(LLM_ARGS.fields["max_num_tokens"], settings.max_prompt_tokens),
        # Trap: the default, TorchSampler, ignores the seeds of requests in this version and starts every engine at
        # seed 42: freshly started engines that are given the same prompts draw the same. This one gives each request
        # a stream of its own seed, whatever the engine; the engine checks at its start that it does.
        "sampler_type": "TRTLLMSampler",
        "enable_sleep": colocated,
        "ray_worker_extension_cls": worker_extension,
    }
