"""How a model's experts are built: mcore's fields for them, and whose gradients they share."""

from __future__ import annotations

from typing import Any

import torch

EXPERTS = ".experts."
"""Stands in the name of every expert's parameter, and of no other."""


def expert_fields(provider: Any) -> dict[str, Any]:
    """Fields of mcore's TransformerConfig for a model with experts; none for a dense one.

    No token is dropped, and the loss is the algorithm's alone. mcore multiplies its auxiliary loss by the number of
    tokens, for a division that this project does not do, and takes it of each micro-batch by itself: the gradient
    would depend on how the batch is cut. The router computes in fp32, whatever the rest does: a rounded score sends a
    token to another expert.

    Args:
        provider: the Bridge's, with the model's sizes.
    """
    if not provider.num_moe_experts:
        return {}
    on_gpu = torch.cuda.is_available()
    return {
        "expert_tensor_parallel_size": 1,  # an expert is whole on its rank
        "moe_grouped_gemm": on_gpu,
        "moe_permute_fusion": on_gpu,
        "moe_router_dtype": "fp32",
        "moe_router_fusion": False,  # it would choose by itself where routes are to be replayed
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def mark_experts(module: torch.nn.Module) -> None:
    """Have the gradients of experts summed over the ranks that hold the same ones, and their state kept apart.

    mcore does so where experts are distributed alone. With tensor parallelism, and each rank holding all experts, it
    would sum them over the wrong ranks, without an error; and an optimizer's state would have another form.
    """
    experts: list[Any] = [parameter for name, parameter in module.named_parameters() if EXPERTS in name]
    for parameter in experts:
        parameter.allreduce = False
