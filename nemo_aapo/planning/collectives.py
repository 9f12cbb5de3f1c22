"""Seconds that ranks wait for one another's numbers, as far as mcore does not overlap it with computing.

Ranks are numbered tensor first, then context, data, pipeline; experts are distributed over neighbours of a pipeline
stage, whatever group they belong to. Latencies are left out: all of it is bytes over the bandwidth of a link.
"""

from __future__ import annotations

from nemo_aapo.planning import memory
from nemo_aapo.planning.inputs import Inputs


def pass_seconds(inputs: Inputs, passes: float) -> dict[str, float]:
    """Part -> seconds of the collectives of passes over the whole batch.

    Args:
        passes: the collectives are those of so many forward passes; a backward pass has as many as a forward pass.
    """
    layout, model = inputs.layout, inputs.model
    times = passes * model.layers / layout.pipeline * _tokens(inputs) * memory.WEIGHT_BYTES[inputs.learner.numbers]
    found = {}
    if layout.tensor > 1:
        reduced = 1 if model.experts else 2  # attention, and a dense feed-forward block; experts are not cut
        found["tensor-parallel collectives"] = times * reduced * 2 * _exchange(inputs, model.hidden, 1, layout.tensor)
    if model.experts and layout.expert > 1:
        sent = 2 * model.experts_per_token * model.hidden / layout.tensor  # there and back; sequence parallel
        found["experts' all-to-all"] = times * _exchange(inputs, sent, 1, layout.expert)
    return found


def ring_seconds(inputs: Inputs) -> float:
    """Seconds in which the keys and values of each token go round its context-parallel group, in one forward pass.

    TransformerEngine (cp_comm_type p2p) computes attention with one part of them while the next is on its way.
    """
    layout, model = inputs.layout, inputs.model
    width = layout.context * 2 * model.key_value / layout.tensor
    times = model.layers / layout.pipeline * _tokens(inputs) * memory.WEIGHT_BYTES[inputs.learner.numbers]
    return times * _exchange(inputs, width, layout.tensor, layout.context)


def decode_seconds(inputs: Inputs, rows: float) -> float:
    """Seconds of the collectives of one decoding step of the in-process engine, in all layers; elsewhere 0.

    Tensor-parallel ranks add their sums after attention and after the feed-forward block. With EP > TP the rows of the
    EP / TP engines that decode in step are gathered before the experts, and the experts' sums added after them.

    Args:
        rows: number of sequences of one engine.
    """
    layout, model = inputs.layout, inputs.model
    if inputs.engine.kind != "megatron":
        return 0.0
    row = model.layers * model.hidden * memory.WEIGHT_BYTES[inputs.learner.numbers]
    if not model.experts or layout.expert <= layout.tensor:
        return 4 * _exchange(inputs, rows * row, 1, layout.tensor)
    all_rows = rows * layout.expert / layout.tensor
    return 2 * _exchange(inputs, rows * row, 1, layout.tensor) + 3 * _exchange(inputs, all_rows * row, 1, layout.expert)


def gradient_seconds(inputs: Inputs, dense: float, experts: float) -> float:
    """Seconds in which the ranks that hold the same parameters add their gradients and share their new weights.

    A distributed optimizer reduce-scatters gradients and all-gathers weights; without it gradients are all-reduced.

    Args:
        dense: number of trained parameters of a rank, experts left out.
        experts: those of its experts.
    """
    learner, layout = inputs.learner, inputs.layout
    reduced = 0 if learner.overlap_grad_reduce else memory.GRADIENT_BYTES
    gathered = 0 if learner.overlap_param_gather else memory.WEIGHT_BYTES[learner.numbers]
    each = reduced + (gathered if learner.distributed_optimizer else reduced)
    return _exchange(inputs, dense * each, layout.tensor, layout.copies) + _exchange(
        inputs, experts * each, layout.expert, layout.expert_copies
    )


def _tokens(inputs: Inputs) -> float:
    """Tokens of a step that pass each rank of a pipeline stage, before sequence parallelism cuts them."""
    return inputs.work.tokens / inputs.layout.data / inputs.layout.context


def _exchange(inputs: Inputs, number: float, stride: int, ranks: int) -> float:
    """Seconds in which each of so many ranks sends the others their shares of bytes, all links busy at a time.

    Args:
        number: bytes of a rank, its own share included.
        stride: distance between the group's neighbours in the numbering of ranks.
        ranks: number of ranks of the group.
    """
    hardware, node = inputs.hardware, max(1, inputs.layout.ranks_per_node // stride)
    near = min(ranks, node)
    return number / ranks * max((near - 1) / hardware.nvlink, (ranks - near) / hardware.network)
