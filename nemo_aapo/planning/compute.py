"""Tokens, FLOPs and a lower bound on the time of each phase of a step.

Each part takes at least its FLOPs at the GPU's rate or its bytes at the memory's, whichever is longer. Added to it is
only what mcore does not overlap: pipeline bubble, collectives, and the optimizer's pass over its state.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aapo.planning import collectives, memory, parameters
from nemo_aapo.planning.hardware import Rates
from nemo_aapo.planning.inputs import Inputs

OPTIMIZER_TRAFFIC_BYTES = {"fp32": 28, "bf16": 30, "fp8": 30}
"""Bytes that the optimizer moves for a parameter: gradient read, moments and float32 value read and written,
low-precision value written."""


@dataclass(frozen=True)
class Phase:
    """One phase of a step, over all GPUs."""

    name: str
    tokens: float
    """Tokens that pass the model."""
    flops: float
    seconds: float
    """Lower bound of its time."""
    limit: str
    """The part that takes most of that time."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the layers' matrix products (FP8 where asked for), and of the rest (in the compute dtype)."""

    layers: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        return self.layers + self.rest

    def seconds(self, rates: Rates, numbers: str) -> float:
        """Seconds that one GPU needs for them at these rates."""
        rest = rates.fp32 if numbers == "fp32" else rates.bf16
        layers = rates.fp8 if numbers == "fp8" else rest
        return self.layers / layers + self.rest / rest


def layer_matrices(inputs: Inputs) -> float:
    """Number of the layers' parameters that one token is multiplied with."""
    model = inputs.model
    mlp = parameters.mlp_matrices(model)
    mlp = mlp * model.experts_per_token + model.hidden * model.experts if model.experts else mlp
    return model.layers * (parameters.attention_matrices(model) + mlp)


def forward(inputs: Inputs, tokens: float, pairs: float, scored: float) -> Flops:
    """FLOPs of a forward pass: 2 for each parameter and token; 4 for each query element and token that it attends to.

    Args:
        tokens: number of tokens that pass the layers.
        pairs: number of pairs (token, token that it attends to), over all sequences.
        scored: number of tokens that pass the output layer.
    """
    model = inputs.model
    attention = 4 * pairs * model.query * model.layers
    return Flops(2 * layer_matrices(inputs) * tokens, attention + 2 * scored * model.vocabulary * model.hidden)


def train_flops(inputs: Inputs) -> Flops:
    """FLOPs of one optimizer step: three forward passes' worth, or four of what is recomputed: layers and attention
    with full recomputation, attention alone with ``core_attn``; of ``mlp`` and ``moe`` it isn't counted.

    The output layer always takes four, as log-probs recompute the logits of each tile in the backward pass
    (learner/logprobs.py); prompts are not scored. Weights below adapters have no gradients: one forward pass's worth
    less. The FLOPs of the adapters themselves are not counted.
    """
    work = inputs.work
    once = forward(inputs, work.tokens, _pairs(inputs), 0)
    head = forward(inputs, 0, 0, work.completions * work.completion_tokens)
    learner = inputs.learner
    full = learner.recompute == "full"
    attention = full or (learner.recompute == "selective" and "core_attn" in learner.recompute_modules)
    frozen = int(learner.lora is not None)
    layers = once.layers * ((4 if full else 3) - frozen)
    return Flops(layers, once.rest * (4 if attention else 3) + (4 - frozen) * head.rest)


def score_flops(inputs: Inputs) -> Flops:
    """FLOPs of one forward pass over the batch."""
    work = inputs.work
    return forward(inputs, work.tokens, _pairs(inputs), work.completions * work.completion_tokens)


def _pairs(inputs: Inputs) -> float:
    """Causal pairs of all sequences, as if all had the mean length, which is a lower bound."""
    work = inputs.work
    return work.completions * (work.prompt_tokens + work.completion_tokens) ** 2 / 2


# ---------------------------------------------------------------- rollout


def decode_weight_bytes(inputs: Inputs, rows: float) -> float:
    """Bytes of weights that each working GPU of an engine reads in one decoding step of ``rows`` sequences.

    Experts are read if a row is sent to them: with rows sent evenly and independently, 1 - (1 - k / E)^rows of them.
    In process, EP > TP makes EP / TP engines decode in step, each holding a share of the experts for the rows of all;
    with EP < TP, TP / EP ranks hold the same experts and share the rows.
    """
    model, count, gpus = inputs.model, parameters.whole(inputs.model), _engine_gpus(inputs)
    experts, holders = 0.0, inputs.layout.expert if inputs.engine.kind == "megatron" else gpus
    if model.experts:
        missed = (1 - model.experts_per_token / model.experts) ** (rows * holders / gpus)
        experts = count.experts / holders * (1 - missed)
    output = model.vocabulary * model.hidden
    return ((count.linear + count.small + output) / gpus + experts) * memory.engine_number_bytes(inputs)


def _engine_gpus(inputs: Inputs) -> int:
    """GPUs of an engine that work at a time: the in-process engine passes one pipeline stage after the other."""
    return inputs.layout.tensor if inputs.engine.kind == "megatron" else inputs.engine.gpus


def decode_step_seconds(inputs: Inputs, rates: Rates, rows: float, context: float) -> float:
    """One decoding step of ``rows`` sequences: weights, keys and values over bandwidth, and collectives."""
    cache = rows * context * memory.kv_bytes_per_token(inputs, 1, 1) / _engine_gpus(inputs)
    moving_s = (decode_weight_bytes(inputs, rows) + cache) / rates.memory
    return moving_s + collectives.decode_seconds(inputs, rows)


def rollout_phases(inputs: Inputs, rates: Rates) -> tuple[Phase, Phase]:
    """The phases of a rollout: each prompt is prefilled once, then its completions are decoded."""
    work, engine, gpus = inputs.work, inputs.engine, _engine_gpus(inputs)
    numbers = "fp32" if engine.kind == "megatron" and inputs.learner.numbers == "fp32" else "bf16"
    prompts, sequences = work.prompts / engine.engines, work.completions / engine.engines
    prefill = forward(inputs, prompts * work.prompt_tokens, prompts * work.prompt_tokens**2 / 2, prompts)
    rows = memory.rows_at_a_time(inputs)
    read_once = decode_weight_bytes(inputs, rows) / rates.memory
    length = work.completion_tokens - 1  # the prefill gives the first token
    decoded, steps = sequences * length, max(length, sequences * length / rows)
    attended = sequences * (length * work.prompt_tokens + length**2 / 2)
    decode = forward(inputs, decoded, attended, decoded)
    moved = steps * decode_weight_bytes(inputs, min(rows, sequences))
    moved += attended * memory.kv_bytes_per_token(inputs, 1, 1) / gpus

    def phase(name: str, tokens: float, flops: Flops, moving_s: float) -> Phase:
        parts = {"FLOPs": flops.seconds(rates, numbers) / gpus, "memory bandwidth": moving_s}
        sending_s = collectives.decode_seconds(inputs, tokens)
        seconds = max(parts.values()) + sending_s
        parts["collectives"] = sending_s
        limit = max(parts, key=parts.__getitem__)
        return Phase(name, tokens * engine.engines, flops.total * engine.engines, seconds, limit)

    return (
        phase("prefill", prompts * work.prompt_tokens, prefill, read_once),
        phase("decode", decoded, decode, moved / rates.memory),
    )


# ---------------------------------------------------------------- learner


def learner_seconds(inputs: Inputs, rates: Rates, flops: Flops, passes: float) -> dict[str, float]:
    """Part -> seconds of passes over the whole batch: FLOPs, collectives, pipeline bubble.

    Args:
        flops: FLOPs of all the passes, over all ranks.
        passes: the collectives are those of so many forward passes.
    """
    layout = inputs.layout
    computed = flops.seconds(rates, inputs.learner.numbers) / layout.ranks
    found = {"FLOPs": computed, **collectives.pass_seconds(inputs, passes)}
    if layout.context > 1:  # keys and values are sent while attention computes
        attention = forward(inputs, 0, _pairs(inputs), 0).seconds(rates, inputs.learner.numbers) / layout.ranks
        found["keys and values over CP"] = passes * max(0.0, collectives.ring_seconds(inputs) - attention)
    if layout.pipeline > 1:
        bubble = (layout.pipeline - 1) / memory.microbatches(inputs)
        found["pipeline bubble"] = bubble * sum(found.values())
    return found


def train_phase(inputs: Inputs, rates: Rates) -> Phase:
    """The phase of all optimizer steps on one rollout batch."""
    work, learner, layout = inputs.work, inputs.learner, inputs.layout
    flops = train_flops(inputs)
    parts = learner_seconds(inputs, rates, flops, 3 if learner.recompute == "full" else 2)
    stages = range(layout.pipeline)
    counts = [parameters.rank_parameters(inputs.model, layout, stage, learner.lora) for stage in stages]
    most = max(counts, key=lambda count: count.trained)
    parts["gradients and weights over DP"] = collectives.gradient_seconds(
        inputs, most.trained - most.trained_experts, most.trained_experts
    )
    updated = memory.updated(most, learner, layout)
    traffic = updated * OPTIMIZER_TRAFFIC_BYTES[learner.numbers]
    parts["optimizer"] = traffic * (1 - learner.optimizer_on_host) / rates.memory
    parts["optimizer's way to the host"] = updated * 4 * learner.optimizer_on_host / inputs.hardware.pcie
    times = work.updates
    limit = max(parts, key=parts.__getitem__)
    return Phase("train", times * work.tokens, times * flops.total, times * sum(parts.values()), limit)


def score_phase(inputs: Inputs, rates: Rates) -> Phase:
    """The phase of log-probs before the first update, and of the reference's, where the loss needs them."""
    times = inputs.work.scoring_passes
    if not times:
        return Phase("scoring", 0.0, 0.0, 0.0, "not needed")
    flops = score_flops(inputs)
    parts = learner_seconds(inputs, rates, flops, 1)
    limit = max(parts, key=parts.__getitem__)
    return Phase("scoring", times * inputs.work.tokens, times * flops.total, times * sum(parts.values()), limit)


def reference_phase(inputs: Inputs, rollout: tuple[Phase, Phase]) -> Phase:
    """The reference's completions in each step: as many as the policy's (online), or none (cached)."""
    if inputs.work.reference != "online":
        return Phase("reference", 0.0, 0.0, 0.0, "stored" if inputs.work.reference == "cached" else "none")
    swapped = (
        parameters.rank_parameters(inputs.model, inputs.layout, 0, inputs.learner.lora).trained
        * memory.WEIGHT_BYTES[inputs.learner.numbers]
        / inputs.hardware.pcie
    )
    return Phase(
        "reference",
        sum(phase.tokens for phase in rollout),
        sum(phase.flops for phase in rollout),
        sum(phase.seconds for phase in rollout) + swapped,
        rollout[1].limit,
    )


def refit_phase(inputs: Inputs) -> Phase:
    """The phase in which the engine gets new weights: none in process; else all go to the host and back."""
    engine, hardware = inputs.engine, inputs.hardware
    if engine.kind == "megatron":
        seconds, limit = 0.0, "shares the learner's weights"
    else:
        seconds, limit = 2 * parameters.whole(inputs.model).total * 2 / hardware.pcie, "PCIe, both ways"
    if engine.offload_learner:
        away = memory.rank_memory(inputs).host[memory.OFFLOADED_OPTIMIZER]
        seconds, limit = seconds + 2 * away / hardware.pcie, "PCIe, the optimizer's way out and back"
    return Phase("refit", 0.0, 0.0, seconds, limit)


def step(inputs: Inputs, rates: Rates) -> tuple[Phase, ...]:
    """The phases of a step, one after the other."""
    rollout = rollout_phases(inputs, rates)
    return (
        *rollout,
        reference_phase(inputs, rollout),
        score_phase(inputs, rates),
        train_phase(inputs, rates),
        refit_phase(inputs),
    )


def seconds_of(phases: tuple[Phase, ...]) -> float:
    """Seconds of all the phases of a step."""
    return sum(phase.seconds for phase in phases)


@dataclass(frozen=True)
class StoreSaving:
    """The cost of reference rewards over the whole run: sampled once and stored, against anew in each step."""

    online_completions: int
    stored_completions: int
    online_seconds: float
    stored_seconds: float
    distinct_prompts: int
    data_is_known: bool


def store_saving(inputs: Inputs, rates: Rates) -> StoreSaving:
    """What ``algorithm.reference=cached`` saves: K completions of each distinct prompt, not G each time it is taken."""
    work = inputs.work
    taken = work.steps * work.prompts
    distinct = min(taken, work.dataset_prompts or taken)
    online, stored = taken * work.group_size, distinct * work.reference_samples
    each = sum(phase.seconds for phase in rollout_phases(inputs, rates)) / work.completions
    return StoreSaving(online, stored, online * each, stored * each, distinct, work.dataset_prompts is not None)


def straggler_seconds(inputs: Inputs, rates: Rates, completion_tokens: int) -> float:
    """Seconds of one completion that decodes alone at the end of a rollout: each token reads all weights."""
    return completion_tokens * decode_weight_bytes(inputs, 1) / rates.memory
