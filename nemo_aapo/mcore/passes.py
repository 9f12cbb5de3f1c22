"""Micro-batches through mcore's pipeline schedule, up to the hidden states of the last stage."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

from nemo_aapo.mcore.experts.metrics import RouterWatch
from nemo_aapo.mcore.experts.routing import RoutingReplay
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.model import hidden_states_out
from nemo_aapo.mcore.packing import packed_sequences, rotary_positions
from nemo_aapo.trace import spans

T = TypeVar("T")
Sums = dict[str, torch.Tensor]
LossOfHidden = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Sums]]
"""``loss(hidden, batch)`` -> (this micro-batch's part of the loss, detached sums for metrics)."""


def forward(
    module: GPTModel,
    batches: Sequence[MicroBatch],
    finish: Callable[[torch.Tensor, MicroBatch], T],
    wrapped: DistributedDataParallel | None = None,
) -> list[T]:
    """Forward passes alone. Collective.

    Args:
        batches: this data-parallel rank's, the same number on every rank.
        finish: called on the last stage with the hidden states [s, b, h] of each micro-batch (cut along s under
            sequence parallelism).
        wrapped: the module in its gradient buffers, where it has them: weights may have to be gathered before a pass.

    Returns:
        What ``finish`` returned for each micro-batch; empty on other stages than the last.
    """
    return _run(module, batches, finish, wrapped, RoutingReplay(module, batches, trains=False))


def forward_and_backward(
    module: GPTModel, batches: Sequence[MicroBatch], loss: LossOfHidden, wrapped: DistributedDataParallel
) -> tuple[list[Sums], tuple[float, float], dict[str, float]]:
    """Forward and backward passes; the gradients are in the buffers of ``wrapped``, reduced over all ranks. Collective.

    Args:
        batches, wrapped: as ``forward``.
        loss: summed over all micro-batches of all ranks it is the loss.

    Returns:
        ``loss`` and the loss function's sums of each micro-batch, empty on other stages than the last; what this
        rank's routers replayed (``RoutingReplay.counts``); and what those of all ranks did (``RouterWatch.metrics``).
    """

    def three_parts(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """As mcore wants it: the loss, a number of tokens (unused, see ``connect``), what to report.

        The loss is cloned for the report, since the schedule works on the original in place.
        """
        value, sums = loss(hidden, batch)
        tokens = torch.tensor(batch.targets.numel(), dtype=torch.int, device=value.device)
        return value, tokens, {"loss": value.detach().clone(), **sums}

    replay = RoutingReplay(module, batches, trains=True)
    with RouterWatch(module) as watch:
        outputs = _run(module, batches, three_parts, wrapped, replay, watch, forward_only=False)
    return outputs, replay.counts(), watch.metrics()


def connect(wrapped: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Tell the schedule of a model how its loss is scaled and when its gradients are reduced."""
    config = wrapped.module.config
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = wrapped.no_sync
    # Our token weights hold 1 / (global denominator) already: mcore must neither count tokens nor divide.
    config.finalize_model_grads_func = _finalize


def _finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **more: object) -> None:
    with spans.span("gradients over ranks"):
        finalize_model_grads(model, **more)


def whole_hidden(hidden: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Hidden states [s, b, h], whole on every tensor-parallel rank, as the vocabulary-parallel output layer takes them.

    Their gradient is a sum over the ranks, each of which has its own rows of the output layer.
    """
    if sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)


def _run(
    module: GPTModel,
    batches: Sequence[MicroBatch],
    on_last_stage: Callable[[torch.Tensor, MicroBatch], object],
    wrapped: DistributedDataParallel | None,
    replay: RoutingReplay,
    watch: RouterWatch | None = None,
    forward_only: bool = True,
) -> list:
    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        packing = None if batch.cu_seqlens is None else packed_sequences(batch)
        replay.start(batch)
        watching = watch.forward_pass(batch) if watch else contextlib.nullcontext()
        with hidden_states_out(module), rotary_positions(module, batch), watching:
            hidden = model(batch.input_ids, batch.position_ids, None, packed_seq_params=packing)

        def finish(hidden: torch.Tensor, non_loss_data: bool = False) -> object:
            return on_last_stage(hidden, batch)

        return hidden, finish

    with replay, _micro_batches_recorded():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[module if wrapped is None else wrapped],
            num_microbatches=len(batches),
            seq_length=max(batch.input_ids.shape[1] for batch in batches),
            micro_batch_size=max(batch.input_ids.shape[0] for batch in batches),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


@contextlib.contextmanager
def _micro_batches_recorded() -> Iterator[None]:
    """Inside, each micro-batch's pass through this stage, forward and backward, is a span where somebody records."""
    if spans.recorder is None:
        yield
        return
    originals = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}
    for name, original in originals.items():
        setattr(schedules, name, _recorded(original, name.removesuffix("_step")))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(schedules, name, original)


def _recorded(original: Callable, name: str) -> Callable:
    numbers = itertools.count(1)

    def call(*args: object, **options: object) -> object:
        with spans.span(f"{name} {next(numbers)}", "micro-batch"):
            return original(*args, **options)

    return call
