"""Megatron's groups of ranks: made here, and handed to ``distributed/parallel.py``, where everybody else asks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.parallel import Groups
from nemo_aapo.mcore.cpu import patches


def initialize_model_parallel(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    expert_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    seed: int,
    timeout_s: float,
) -> None:
    """Make megatron-core usable on this machine, join the job's ranks, and cut them into groups. Collective.

    Experts are whole on their ranks: their tensor-parallel size is 1, whatever that of the other layers is.

    Args:
        seed: of mcore's random number tracker; the training loop itself samples nothing from global generators.
        timeout_s: a collective that waits longer raises.

    Raises:
        DriftError: the installed megatron-core is not the one that this package was written for.
    """
    patches.install()
    parallel.join(timeout_s)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, int(timeout_s / 60)),
    )
    parallel.use(
        Groups(
            data=parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
            model=parallel_state.get_model_parallel_group(),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            context=parallel_state.get_context_parallel_group(),
            expert=parallel_state.get_expert_model_parallel_group(),
        )
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_model_parallel() -> None:
    """Leave all groups, and the job's ranks."""
    parallel_state.destroy_model_parallel()
    parallel.leave()


def gather_columns(part: torch.Tensor) -> torch.Tensor:
    """This rank's slice [..., n / TP] of a tensor -> [..., n], on all tensor-parallel ranks. Collective."""
    return tensor_parallel.gather_from_tensor_model_parallel_region(part)
