"""mcore's optimizer and its learning rate by the configuration: Adam, its state whole or sharded, on GPU or host."""

from __future__ import annotations

import contextlib

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import optimizer as mcore_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_aapo.config import Config, kind_of
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.cpu import patches as cpu

CHECKPOINT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""How the optimizer's state is saved: as one tensor a parameter, whichever optimizer of a chain has it, so that any
TP x PP x EP x DP can load it."""


def data_parallel(config: Config, module: GPTModel) -> DistributedDataParallel:
    """The model in mcore's data parallelism: gradients in one fp32 buffer, reduced over the data-parallel ranks."""
    optim = config.model.optim
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
    )
    return DistributedDataParallel(module.config, settings, module)


def build_optimizer(config: Config, model: DistributedDataParallel) -> MegatronOptimizer:
    """Adam with decoupled weight decay.

    Main weights and moments are fp32. With bf16 weights they are copies; ``use_distributed_optimizer`` gives each
    data-parallel rank a part of them, and ``cpu_offload_fraction`` keeps (and updates) so much in host memory.
    """
    optim, kind = config.model.optim, kind_of(config)
    offloaded = optim.cpu_offload_fraction > 0
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.sched.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=kind.bf16,
        params_dtype=precision.dtype(config),
        fp8_recipe=kind.fp8_recipe,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=optim.overlap_param_gather,
        optimizer_cpu_offload=offloaded,
        optimizer_offload_fraction=optim.cpu_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=offloaded,
        use_precision_aware_optimizer=offloaded,  # mcore's offloading goes by that path
    )
    on_cpu = not torch.cuda.is_available()
    as_on_gpu = on_cpu and optim.use_distributed_optimizer
    typed = cpu.types_as_on_gpu(model.parameters()) if as_on_gpu else contextlib.nullcontext()
    # Each rank's part of an fp32 parameter is a view of it. One that autograd knows of would keep the parameter's node
    # alive, with it mcore's hook and all that this refers to: the model and its groups would never be collected.
    with torch.no_grad(), typed:
        optimizer = get_megatron_optimizer(settings, [model])
    for part in parts(optimizer):
        part.optimizer.register_load_state_dict_post_hook(_count_steps_one_by_one)
    if on_cpu and not offloaded:
        for group in (group for part in parts(optimizer) for group in part.optimizer.param_groups):
            group["fused"] = True  # torch's Adam in one pass instead of eight; mcore has no setting for it
    return optimizer


def _count_steps_one_by_one(adam: torch.optim.Optimizer) -> None:
    """The distributed optimizer loads one tensor as the step count of all parameters (distrib_optimizer.py:825), and
    torch's Adam, which it has on a CPU, would count it up once for each of them."""
    for state in adam.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then constant or cosine; counted in optimizer steps."""
    optim, steps = config.model.optim, config.trainer.max_steps * config.algorithm.updates_per_rollout
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr,
        lr_warmup_steps=optim.sched.warmup_steps,
        lr_decay_steps=max(steps, optim.sched.warmup_steps + 1),
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """mcore chains optimizers, of dense and of expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def clip_gradients(optimizer: MegatronOptimizer) -> float:
    """Scale all gradients down to the configured norm, if theirs is larger.

    mcore's own method takes a chain of optimizers for one (optimizer.py:203).

    Returns:
        The norm before, over all ranks.
    """
    norm = optimizer.get_grad_norm()
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if part.config.clip_grad > 0.0 and parameters:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            mcore_optimizer.clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
    return float(norm)


def prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state: the distributed optimizer asks for its step count even before the first update.

    TransformerEngine's and apex's keep that count elsewhere.
    """
    for adam in (part.optimizer for part in parts(optimizer) if isinstance(part, DistributedOptimizer)):
        if not isinstance(adam, torch.optim.Adam):
            continue
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
