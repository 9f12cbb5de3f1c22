"""The line ``trtllm``: what Megatron-Bridge 0.3.1 needs changed."""

from __future__ import annotations

import re
from typing import Any

import torch

from nemo_aapo.distributed import parallel


def mend_bridge() -> None:
    """Change the functions of Megatron-Bridge that ``replaced.OF_BRIDGE`` lists."""
    _scatter_contiguous()
    _experts_one_by_one()


def _scatter_contiguous() -> None:
    """gloo's scatter misreads non-contiguous tensors without an error: every row-parallel weight would arrive wrong."""
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    original = MegatronParamMapping.scatter_to_tp_ranks

    def scatter_to_tp_ranks(self: Any, splits: list[torch.Tensor] | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, splits and [split.contiguous() for split in splits], *args, **kwargs)

    MegatronParamMapping.scatter_to_tp_ranks = scatter_to_tp_ranks


def _experts_one_by_one() -> None:
    """The Bridge has maps for experts that are modules of their own, as on a CPU, but numbers TransformerEngine's only.

    Under expert parallelism each rank would load the first experts, without an error (model_bridge.py:148), and the
    export of any fails (param_mapping.py:677).
    """
    from megatron.bridge.models.conversion import model_bridge
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    to_global, gather = model_bridge._megatron_local_name_to_global, MegatronParamMapping.gather_from_ep_ranks

    def name_to_global(models: Any, config: Any, param_name: str, vp_stage: int | None = None) -> str:
        name = to_global(models, config, param_name, vp_stage)
        first = (config.num_moe_experts or 0) // parallel.expert_parallel_size() * parallel.expert_parallel_rank()
        return re.sub(r"(?<=\.local_experts\.)\d+", lambda number: str(first + int(number[0])), name)

    def gather_from_ep_ranks(self: Any, weights: torch.Tensor | None, module: Any, name: str | None) -> Any:
        own = self.megatron_param
        if one := re.fullmatch(r"(.*\.experts\.)local_experts\.(\d+)\.(\w+\.\w+)", own):
            self.megatron_param = f"{one[1]}{one[3]}{one[2]}"  # as TransformerEngine's are called
        try:
            return gather(self, None if weights is None else weights.contiguous(), module, name)
        finally:
            self.megatron_param = own

    model_bridge._megatron_local_name_to_global = name_to_global
    MegatronParamMapping.gather_from_ep_ranks = gather_from_ep_ranks
