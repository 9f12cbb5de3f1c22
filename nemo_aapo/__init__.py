"""AAPO (Advantage-Augmented Policy Optimization, arXiv 2505.14264) for Megatron policies.

The names below are imported when they are first used: ``import nemo_aapo`` itself costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# precision=fp8_blockwise: scales as they are, not rounded to powers of two. TransformerEngine reads it as it is
# imported, by megatron-core in passing, whatever of that comes first.
os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")

_EXPORTS = {
    "AAPOTrainer": "training.trainer",
    "Algorithm": "algorithms",
    "Checkpointer": "checkpoint.checkpointer",
    "Completion": "types",
    "Config": "config",
    "ConfigError": "errors",
    "Group": "types",
    "MegatronEngine": "engines.megatron.engine",
    "MegatronPolicy": "learner.policy",
    "Prompt": "types",
    "PromptSet": "data.prompts",
    "RewardRunner": "rewards.workers.runner",
    "SamplingSpec": "types",
    "build_training": "training.build",
    "load_config": "config.compose",
    "load_prompts": "data.prompts",
    "load_tokenizer": "data.tokenizer",
    "make_prompts": "data.prompts",
    "train": "jobs.train",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
