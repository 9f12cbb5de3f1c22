"""The tensors that a forward pass keeps for the backward pass, term by term, as data.

The method is that of Korthikanti et al. (arXiv 2205.05198, section 4): name every tensor that some operation saves.
The terms are those of today's layers: gated feed-forward, RMSNorm, grouped queries, no dropout.

``LOCAL`` is mcore's local layers on CPU, checked against measured bytes in tests/planning/test_planned_memory.py.
``TRANSFORMER_ENGINE`` was read from the sources of TransformerEngine 2.11 and mcore 0.16; with it, the planned peak of
a training step is within 2 % of the one measured on an H200 (the figures are in the tests of planning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_aapo.planning.inputs import Layout, Learner
from nemo_aapo.planning.models import PlannedModel


@dataclass(frozen=True)
class Term:
    """A tensor that one layer saves.

    Example:
        ``Term("fc1 output", {"ffn": 2}, "...", recomputed_with="mlp", only="dense")``: a dense layer saves 2 x ffn
        numbers for each token, unless its ``mlp`` is recomputed.
    """

    name: str
    width: dict[str, float]
    """Dimension (see ``dimensions``) -> how many times as many numbers are saved for each token."""
    source: str
    """The code that saves the tensor."""
    numbers: Literal["compute", "linear_input", "fp32"] = "compute"
    """Dtype of the numbers: the compute dtype; that of inputs of matrix products, a byte under FP8; or float32."""
    cut: Literal["tensor", "sequence", "whole", "row"] = "tensor"
    """How the tensor is sharded over the tensor-parallel ranks: always, under sequence parallelism only, or never; and
    always over context-parallel ranks. ``row``: as ``tensor``, but each context-parallel rank has all tokens."""
    recomputed_with: Literal["core_attn", "mlp", "moe"] | None = None
    """The one of ``model.recompute_modules`` that recomputes it under selective recomputation; None: none does."""
    per_position: bool = False
    """True: one row serves all sequences of the micro-batch."""
    only: Literal["qk_norm", "copied_query", "few_keys", "dense", "experts", "fp8"] | None = None
    """The models, precisions or layouts that have the tensor; None: all. ``copied_query``: with normalised queries and
    several groups on a rank, where mcore's reshape is a copy. ``few_keys``: with fewer key heads than ranks to cut."""


_LOCAL_NORM = "mcore/cpu/kernels.py, rms_norm: the input and 1/rms"
_LOCAL_LINEAR = "mcore tensor_parallel/layers.py, LinearWithGradAccumulationAndAsyncCommunication: the input"
_LOCAL_ROTARY = "mcore/cpu/kernels.py, rotary: with the angles, for all layers"
_LOCAL_ATTENTION = "torch's scaled_dot_product_attention on CPU: q, k, v, out, logsumexp"
_MOE = "mcore transformer/moe: router probabilities; tokens spread evenly over the experts"
_TE_EXPERTS = "TransformerEngine module/grouped_linear.py: inputmats; mcore fusions/fused_bias_swiglu.py: its input"
_LOCAL_EXPERTS = "mcore/experts/grouped.py, _Experts: the rows, gate and up"
_LOCAL_MLP = "mcore/cpu/kernels.py, swiglu: its input"

LOCAL: tuple[Term, ...] = (
    Term("attention norm input", {"hidden": 1}, _LOCAL_NORM, cut="sequence"),
    Term("attention norm, 1/rms", {"one": 1}, _LOCAL_NORM, "fp32", "sequence"),
    Term("qkv input", {"hidden": 1}, _LOCAL_LINEAR, cut="sequence"),
    Term("qkv output", {"query": 1, "key_value": 2}, _LOCAL_ATTENTION + ". The values are a part of it: all stays"),
    Term(
        "query norm input", {"query": 1}, "mcore transformer/attention.py copies it; not the key's", only="copied_query"
    ),
    Term("query and key norm, 1/rms", {"heads": 1, "groups": 1}, _LOCAL_NORM, "fp32", only="qk_norm"),
    Term("query, key", {"query": 1, "key_value": 1}, _LOCAL_ATTENTION),
    Term("attention output", {"query": 1}, _LOCAL_ATTENTION + "; it is the projection's input as well"),
    Term("softmax statistics", {"heads": 1}, _LOCAL_ATTENTION, "fp32", recomputed_with="core_attn"),
    Term(
        "keys and values of all ranks", {"key_value": 2}, "mcore/cpu/attention.py, gathered", cut="row", only="few_keys"
    ),
    Term("mlp norm input", {"hidden": 1}, _LOCAL_NORM, cut="sequence"),
    Term("mlp norm, 1/rms", {"one": 1}, _LOCAL_NORM, "fp32", "sequence"),
    Term("fc1 input", {"hidden": 1}, _LOCAL_LINEAR, cut="sequence"),
    Term("fc1 output", {"ffn": 2}, _LOCAL_MLP, recomputed_with="mlp", only="dense"),
    Term("fc2 input", {"ffn": 1}, _LOCAL_LINEAR, recomputed_with="mlp", only="dense"),
    Term("router", {"experts": 2, "sent": 4}, _MOE, "fp32", "sequence", "moe", only="experts"),
    Term("tokens sent to experts", {"sent_hidden": 1}, _LOCAL_EXPERTS, "compute", "sequence", "moe", only="experts"),
    Term("experts' fc1 output", {"sent_ffn": 2}, _LOCAL_EXPERTS, "compute", "sequence", "moe", only="experts"),
)

_TE_NORM_LINEAR = "TransformerEngine module/layernorm_linear.py: inputmat, ln_out, rsigma"
_TE_LINEAR = "TransformerEngine module/linear.py: saved_inputmat"
_TE_ATTENTION = "TransformerEngine attention/dot_product_attention/backends.py, FusedAttnFunc: q, k, v, out, statistics"
_SWIGLU = "mcore fusions/fused_bias_swiglu.py, BiasSwiGLUFunction and SwiGLUFunction: its input"

TRANSFORMER_ENGINE: tuple[Term, ...] = (
    Term("attention norm input", {"hidden": 1}, _TE_NORM_LINEAR, cut="sequence"),
    Term("attention norm, 1/rms", {"one": 1}, _TE_NORM_LINEAR, "fp32", "sequence"),
    Term("qkv input", {"hidden": 1}, _TE_NORM_LINEAR, "linear_input", "sequence"),
    Term(
        "query and key norm input",
        {"query": 1, "key_value": 1},
        "TransformerEngine ops/basic/rmsnorm.py",
        only="qk_norm",
    ),
    Term("query and key norm, 1/rms", {"heads": 1, "groups": 1}, "the same", "fp32", only="qk_norm"),
    Term("query, key, value", {"query": 1, "key_value": 2}, _TE_ATTENTION),
    Term("attention output", {"query": 1}, _TE_ATTENTION + "; it is the projection's input as well"),
    Term("softmax statistics", {"heads": 1}, _TE_ATTENTION, "fp32", recomputed_with="core_attn"),
    Term("projection input", {"query": 1}, _TE_LINEAR + ", a copy in FP8", "linear_input", only="fp8"),
    Term("mlp norm input", {"hidden": 1}, _TE_NORM_LINEAR, cut="sequence"),
    Term("mlp norm, 1/rms", {"one": 1}, _TE_NORM_LINEAR, "fp32", "sequence", recomputed_with="mlp"),
    Term("fc1 input", {"hidden": 1}, _TE_NORM_LINEAR, "linear_input", "sequence", recomputed_with="mlp"),
    Term("fc1 output", {"ffn": 2}, _SWIGLU, recomputed_with="mlp", only="dense"),
    Term("fc2 input", {"ffn": 1}, _TE_LINEAR, "linear_input", recomputed_with="mlp", only="dense"),
    Term("router", {"experts": 2}, _MOE, "fp32", "sequence", "moe", only="experts"),
    Term("tokens sent to experts", {"sent_hidden": 1}, _TE_EXPERTS, "compute", "sequence", "moe", only="experts"),
    Term("experts' fc1 output", {"sent_ffn": 2}, _TE_EXPERTS, "compute", "sequence", "moe", only="experts"),
    Term("experts' fc2 input", {"sent_ffn": 1}, _TE_EXPERTS, "linear_input", "sequence", "moe", only="experts"),
)

_OF_KIND = {"local": LOCAL, "transformer_engine": TRANSFORMER_ENGINE}
_LAYER_INPUT = (Term("layer input", {"hidden": 1}, "mcore tensor_parallel/random.py, checkpoint", cut="sequence"),)
_FINAL_NORM = {
    "local": (Term("final norm", {"hidden": 1, "one": 1}, _LOCAL_NORM, cut="sequence"),),
    "transformer_engine": (Term("final norm", {"hidden": 1}, _TE_NORM_LINEAR, cut="sequence"),),
}
_KEPT_ONCE = {
    "local": (Term("cosine and sine", {"head_size": 2}, _LOCAL_ROTARY, cut="whole", per_position=True),),
    "transformer_engine": (),
}
_SCORED = (Term("hidden states that are scored", {"hidden": 1}, "learner/logprobs.py", cut="whole"),)
_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch's size: so many sequences of one padded length."""

    sequences: float
    length: int

    @property
    def tokens(self) -> float:
        return self.sequences * self.length


def dimensions(model: PlannedModel) -> dict[str, float]:
    """Name of a dimension, as ``Term.width`` uses it -> its size."""
    return {
        "one": 1,
        "hidden": model.hidden,
        "query": model.query,
        "key_value": model.key_value,
        "heads": model.heads,
        "groups": model.groups,
        "head_size": model.head_size,
        "ffn": model.ffn,
        "experts": model.experts,
        "sent": model.experts_per_token,
        "sent_hidden": model.experts_per_token * model.hidden,
        "sent_ffn": model.experts_per_token * model.ffn,
    }


def stored(terms: Sequence[Term], model: PlannedModel, layout: Layout, learner: Learner, batch: MicroBatch) -> float:
    """Bytes of these terms on one rank, for one layer."""
    sizes = dimensions(model)
    total = 0.0
    for term in terms:
        if not _applies(term, model, layout, learner):
            continue
        cut = layout.context * {"tensor": layout.tensor, "sequence": layout.sequence_cut}.get(term.cut, 1)
        if term.cut == "row":
            cut = layout.tensor
        rows = batch.length if term.per_position else batch.tokens
        width = sum(sizes[dimension] * times for dimension, times in term.width.items())
        total += rows * width / cut * _number_bytes(term, learner)
    return total


def _applies(term: Term, model: PlannedModel, layout: Layout, learner: Learner) -> bool:
    return {
        None: True,
        "qk_norm": model.qk_norm,
        "copied_query": model.qk_norm and model.groups > layout.tensor,
        "few_keys": layout.context > 1 and model.groups // layout.tensor % layout.context != 0,
        "dense": not model.experts,
        "experts": model.experts > 0,
        "fp8": learner.numbers == "fp8",
    }[term.only]


def _number_bytes(term: Term, learner: Learner) -> int:
    if term.numbers == "linear_input" and learner.numbers == "fp8":
        return 1
    return 4 if term.numbers == "fp32" else _BYTES[learner.numbers]


def layer_terms(learner: Learner) -> tuple[tuple[Term, ...], list[tuple[Term, ...]]]:
    """The terms that a layer keeps for its backward pass; and those that are recomputed in it, piece by piece."""
    terms = _OF_KIND[learner.kind]
    if learner.recompute == "full":
        inside = tuple(term for term in terms if term is not terms[0])  # the first is the layer's input itself
        return _LAYER_INPUT, [inside]
    modules = learner.recompute_modules if learner.recompute == "selective" else ()
    kept = tuple(term for term in terms if term.recomputed_with not in modules)
    return kept, [tuple(term for term in terms if term.recomputed_with == module) for module in modules]


def stage_activations(
    model: PlannedModel, layout: Layout, learner: Learner, batch: MicroBatch, stage: int, in_flight: int
) -> float:
    """Peak bytes of saved activations on one rank of a pipeline stage.

    Args:
        in_flight: number of micro-batches whose forward pass is done and whose backward pass is not.
    """
    kept, recomputed = layer_terms(learner)
    layers = model.layers // layout.pipeline
    # Recomputed pieces exist one at a time, and only after the final norm and the scored states are gone.
    passing = [stored(piece, model, layout, learner, batch) for piece in recomputed]
    if stage == layout.pipeline - 1:
        passing.append(stored(_FINAL_NORM[learner.kind] + _SCORED, model, layout, learner, batch))
    once = stored(_KEPT_ONCE[learner.kind], model, layout, learner, batch)
    return once + in_flight * layers * stored(kept, model, layout, learner, batch) + max(passing, default=0.0)


def in_flight(layout: Layout, stage: int, microbatches: int) -> int:
    """Number of micro-batches in flight under the 1F1B schedule (Narayanan et al., arXiv 2104.04473)."""
    return max(1, min(microbatches, layout.pipeline - stage))
