"""Memory of each rank, by part and by phase of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_aapo.planning import activations, parameters
from nemo_aapo.planning.hardware import RUNTIME_BYTES
from nemo_aapo.planning.inputs import Inputs, Layout, Learner
from nemo_aapo.planning.parameters import Parameters

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
FP8_COPIES_BYTES = 2
"""A layer's matrices in FP8, row- and column-wise, kept beside the bf16 ones (TransformerEngine module/base.py,
get_weight_workspace; on Hopper both are needed)."""
GRADIENT_BYTES = 4
ADAM_BYTES = 8
MASTER_BYTES = 4
MIN_TILE_LOGITS = {"local": 2**18, "transformer_engine": 2**26}  # learner/logprobs.py, CPU and GPU
TILE_ALIGNMENT = 128
MAX_PREFILL_TOKENS = 16384  # engines/megatron/scheduler.py
TRTLLM_WORKSPACE_BYTES = 2 * 2**30
"""Activations and workspaces of a TensorRT-LLM engine: an assumption, not a measurement."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank in each phase: phase -> part -> bytes on the GPU; and what lies in host memory."""

    phases: dict[str, dict[str, float]]
    host: dict[str, float]
    capacity: float

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        return max(self.total(phase) for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


def weights(count: Parameters, learner: Learner) -> float:
    """Bytes of the weights as the layers compute with them."""
    copies = FP8_COPIES_BYTES * (count.linear + count.experts) if learner.numbers == "fp8" else 0
    return count.total * WEIGHT_BYTES[learner.numbers] + copies


def gradients(count: Parameters) -> float:
    """Bytes of mcore's gradient buffer, float32."""
    return count.trained * GRADIENT_BYTES


def optimizer(count: Parameters, learner: Learner, layout: Layout) -> float:
    """Bytes of Adam's moments and, under mixed precision, of the float32 weights, wherever they lie.

    A distributed optimizer cuts them over the data-parallel ranks.
    """
    state = ADAM_BYTES + (0 if learner.numbers == "fp32" else MASTER_BYTES)
    return count.trained * state / (layout.data if learner.distributed_optimizer else 1)


def logprobs(inputs: Inputs, tokens: float) -> float:
    """Peak bytes of log-probs and their gradient (learner/logprobs.py), beside the hidden states that go in.

    On a GPU one tile of logits in float32 is held and, under bfloat16, the gradients of this tile and the one before,
    or a float32 product as large as the hidden states' gradient. On a CPU the forward pass holds a tile of scratch as
    well, and under bfloat16 both passes hold one for the product. The gradients of hidden states (float32) and output
    layer come on top.

    Args:
        tokens: that are scored in one micro-batch.
    """
    model, learner = inputs.model, inputs.learner
    tokens = max(1, math.ceil(tokens))
    rows, number = model.vocabulary // inputs.layout.tensor, WEIGHT_BYTES[learner.numbers]
    wanted = max(learner.logprob_chunk_tokens * rows, MIN_TILE_LOGITS[learner.kind])
    tile = tokens * min(max(wanted // tokens // TILE_ALIGNMENT * TILE_ALIGNMENT, TILE_ALIGNMENT), rows)
    low = 0 if number == 4 else number  # in float32 the product is the tile itself
    several = tile < tokens * rows
    hidden = tokens * model.hidden * 4
    gradients = hidden + (0 if learner.lora else rows * model.hidden * number)
    if learner.kind == "local":
        return max(tile * (4 + low + 4), tile * (4 + (3 if several else 2) * low) + gradients)
    one_more = max(tile * low if several else 0, hidden if low else 0)
    return tile * (4 + low) + one_more + gradients


def kv_bytes_per_token(inputs: Inputs, tensor: int, pipeline: int) -> float:
    """Keys and values of one token on one rank of an engine."""
    model = inputs.model
    groups = max(1, model.groups // tensor)
    return 2 * groups * model.head_size * model.layers / pipeline * engine_number_bytes(inputs)


def engine_number_bytes(inputs: Inputs) -> int:
    """Bytes of a number in the engine: the learner's in process, else bfloat16."""
    return WEIGHT_BYTES[inputs.learner.numbers] if inputs.engine.kind == "megatron" else 2


def rows_at_a_time(inputs: Inputs) -> int:
    """Sequences that an engine draws at a time: what its KV cache holds, and no more than it is given."""
    work, engine = inputs.work, inputs.engine
    given = math.ceil(work.completions / engine.engines)
    if engine.kind == "megatron":
        # as engines/megatron/scheduler.py admits them
        return max(
            1, min(given, engine.max_concurrent_tokens // work.max_sequence_tokens)
        )  # engines/megatron/scheduler.py
    held = work.prompt_tokens + work.completion_tokens / 2  # paged: a sequence takes what it has, on average half
    return max(1, min(given, int(engine.max_concurrent_tokens / held)))


def microbatch(inputs: Inputs) -> activations.MicroBatch:
    """The largest micro-batch: the token budget, in sequences of the longest length."""
    length = inputs.work.max_sequence_tokens
    return activations.MicroBatch(inputs.learner.tokens_per_microbatch / length, length)


def microbatches(inputs: Inputs) -> int:
    """Micro-batches of one data-parallel rank in an optimizer step, at least."""
    return max(1, math.ceil(inputs.work.tokens / inputs.layout.data / inputs.learner.tokens_per_microbatch))


def of_rank(inputs: Inputs) -> RankMemory:
    """Memory of the rank that needs the most."""
    stages = [_of_stage(inputs, stage) for stage in range(inputs.layout.pipeline)]
    return max(stages, key=lambda memory: memory.peak)


def _of_stage(inputs: Inputs, stage: int) -> RankMemory:
    learner, layout, engine = inputs.learner, inputs.layout, inputs.engine
    count = parameters.on_rank(inputs.model, layout, stage, learner.lora)
    state = optimizer(count, learner, layout)
    resident = {
        "weights": weights(count, learner),
        "gradients": gradients(count),
        "optimizer": state * (1 - learner.optimizer_on_host),
    }
    clone = count.trained * WEIGHT_BYTES[learner.numbers]
    runtime = {"runtime (assumed)": RUNTIME_BYTES}
    phases = {}
    host = {"optimizer": state * learner.optimizer_on_host}
    if inputs.work.keeps_reference:
        host["reference weights"] = clone
    if engine.kind != "remote":
        phases["rollout"] = rollout = {**resident, **runtime}
        if inputs.work.draws_from_reference:
            rollout["policy, while the reference is swapped in"] = clone
        if engine.offload_learner:  # gradients are dropped, weights stay (mcore/offload.py)
            del rollout["gradients"]
            host["optimizer, while the engine draws"] = rollout.pop("optimizer")
        if learner.lora and engine.kind == "megatron":
            merged = parameters.adapted(inputs.model, layout, learner.lora)
            rollout["adapted layers, merged"] = merged * WEIGHT_BYTES[learner.numbers]
        rollout |= _engine_memory(inputs, sum(rollout.values()))
    if inputs.work.scores_reference:
        phases["scoring"] = {**resident, **runtime, "policy, while the reference is swapped in": clone}
    phases["train"] = {**resident, **runtime, **_training(inputs, count, stage)}
    return RankMemory(phases, {part: size for part, size in host.items() if size}, inputs.hardware.memory_bytes)


def _training(inputs: Inputs, count: Parameters, stage: int) -> dict[str, float]:
    """Activations and what log-probs take on the way down; on the first stage, what the embedding adds at the end."""
    layout, learner, batch = inputs.layout, inputs.learner, microbatch(inputs)
    flying = activations.in_flight(layout, stage, microbatches(inputs))
    kept = activations.of_stage(inputs.model, layout, learner, batch, stage, flying)
    found = {"activations": kept}
    if stage == layout.pipeline - 1:
        found["logits chunk and its gradients"] = logprobs(inputs, batch.tokens)
    # The embedding's gradient comes when its micro-batch's activations are gone; a tied output layer's waits for it.
    both = 0 if learner.lora else count.embedding * (2 if inputs.model.tied and layout.pipeline == 1 else 1)
    at_the_end = both * WEIGHT_BYTES[learner.numbers] + kept * (flying - 1) / flying
    if at_the_end > sum(found.values()):
        found["embedding's gradient, beyond the above"] = at_the_end - sum(found.values())
    return found


def _engine_memory(inputs: Inputs, resident: float) -> dict[str, float]:
    """What the engine holds on the learner's GPUs while it generates."""
    model, layout, engine = inputs.model, inputs.layout, inputs.engine
    if engine.kind == "remote":
        return {}
    rows, number = rows_at_a_time(inputs), engine_number_bytes(inputs)
    if engine.kind == "megatron":
        cached = rows * inputs.work.max_sequence_tokens
        prefill = min(MAX_PREFILL_TOKENS, inputs.work.max_sequence_tokens * rows)
        width = 3 * model.hidden + (2 * (model.query + 2 * model.key_value) + 3 * model.ffn) / layout.tensor
        logits = rows * model.vocabulary * (number + 8)  # gathered, then float32 and its softmax
        return {
            "KV cache": cached * kv_bytes_per_token(inputs, layout.tensor, layout.pipeline),
            "engine": prefill * width * number + logits,
        }
    whole = parameters.whole(model).total * number / engine.gpus
    fixed = whole + TRTLLM_WORKSPACE_BYTES + 2 * engine.refit_bucket_bytes
    free = max(0.0, inputs.hardware.memory_bytes - resident - fixed)
    wanted = engine.max_concurrent_tokens * kv_bytes_per_token(inputs, engine.gpus, 1)
    return {"KV cache": min(wanted, engine.kv_cache_fraction * free), "engine": fixed}
