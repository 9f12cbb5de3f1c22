"""Memory of each rank, by part and by phase of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemo_aapo.config.schema.rollout import Server
from nemo_aapo.planning import activations, parameters
from nemo_aapo.planning.hardware import RUNTIME_BYTES
from nemo_aapo.planning.inputs import Inputs, Layout, Learner
from nemo_aapo.planning.parameters import Parameters

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of a weight by the learner's precision."""
FP8_COPIES_BYTES = 2
"""Bytes of a weight's FP8 copies, row- and column-wise, which are kept beside the bf16 one (TransformerEngine
module/base.py, get_weight_workspace; Hopper needs both)."""
GRADIENT_BYTES = 4
"""Bytes of a parameter's gradient in mcore's buffer, float32."""
ADAM_BYTES = 8
"""Bytes of a parameter's two moments, float32."""
MASTER_BYTES = 4
"""Bytes of a parameter's float32 copy under mixed precision."""
MIN_TILE_LOGITS = {"local": 2**18, "transformer_engine": 2**26}  # learner/logprobs.py, CPU and GPU
TILE_ALIGNMENT = 128
MAX_PREFILL_TOKENS = 16384  # engines/megatron/scheduler.py
TRTLLM_WORKSPACE_BYTES = 2 * 2**30
"""Activations and workspaces of a TensorRT-LLM engine: an assumption, not a measurement."""
OFFLOADED_OPTIMIZER = "optimizer, while the engine draws"
"""The name of the part of host memory that the optimizer takes while the learner is offloaded."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of the fullest rank.

    Example:
        ``RankMemory(phases={"rollout": {"weights": 1.0e9, ...}, "train": {...}}, host={"optimizer": 2.0e9},
        capacity=80e9)``
    """

    phases: dict[str, dict[str, float]]
    """Phase -> part -> bytes on the GPU."""
    host: dict[str, float]
    """Part -> bytes in host memory."""
    capacity: float
    """Bytes of the GPU's memory."""

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

    A distributed optimizer cuts them over the ranks that hold the same parameters.
    """
    state = ADAM_BYTES + (0 if learner.numbers == "fp32" else MASTER_BYTES)
    return updated(count, learner, layout) * state


def updated(count: Parameters, learner: Learner, layout: Layout) -> float:
    """Number of parameters that one rank's optimizer updates."""
    if not learner.distributed_optimizer:
        return count.trained
    return (count.trained - count.trained_experts) / layout.copies + count.trained_experts / layout.expert_copies


def logprobs(inputs: Inputs, tokens: float) -> float:
    """Peak bytes of log-probs and their gradient (learner/logprobs.py), beside the hidden states that go in.

    On a GPU one tile of logits in float32 is held and, under bfloat16, the gradients of this tile and the last one, or
    a float32 product as large as the hidden states' gradient. On a CPU the forward pass also holds a tile of scratch
    memory, and under bfloat16 both passes hold one for the product. The gradients of hidden states (float32) and output
    layer are added.

    Args:
        tokens: number of tokens that are scored in one micro-batch.
    """
    model, learner = inputs.model, inputs.learner
    tokens = max(1, math.ceil(tokens))
    rows, number = model.vocabulary // inputs.layout.tensor, WEIGHT_BYTES[learner.numbers]
    wanted = max(learner.logprob_chunk_tokens * rows, MIN_TILE_LOGITS[learner.kind])
    tile = tokens * min(max(wanted // tokens // TILE_ALIGNMENT * TILE_ALIGNMENT, TILE_ALIGNMENT), rows)
    low = 0 if number == 4 else number  # in float32 the tile itself takes the product
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
    """Number of sequences that run at a time in an engine: what its KV cache holds, at most what it is given."""
    work, engine = inputs.work, inputs.engine
    given = math.ceil(work.completions / engine.engines)
    if engine.kind == "megatron":
        return max(1, min(given, engine.max_concurrent_tokens // work.max_sequence_tokens))  # scheduler.capacity
    held = work.prompt_tokens + work.completion_tokens / 2  # paged: a running sequence takes what it has so far
    return max(1, min(given, int(engine.max_concurrent_tokens / held)))


def microbatch(inputs: Inputs) -> activations.MicroBatch:
    """The largest micro-batch: the token budget, in sequences of the longest length. Context ranks cut it."""
    length = inputs.work.max_sequence_tokens
    return activations.MicroBatch(inputs.learner.tokens_per_microbatch / length, length)


def microbatches(inputs: Inputs) -> int:
    """Least number of micro-batches in an optimizer step, of a data-parallel rank or its context-parallel group."""
    return max(1, math.ceil(inputs.work.tokens / inputs.layout.data / inputs.learner.tokens_per_microbatch))


def rank_memory(inputs: Inputs) -> RankMemory:
    """Memory of the rank that needs the most."""
    stages = [_stage_memory(inputs, stage) for stage in range(inputs.layout.pipeline)]
    return max(stages, key=lambda memory: memory.peak)


def _stage_memory(inputs: Inputs, stage: int) -> RankMemory:
    learner, layout, engine = inputs.learner, inputs.layout, inputs.engine
    count = parameters.rank_parameters(inputs.model, layout, stage, learner.lora)
    state = optimizer(count, learner, layout)
    resident = {
        "weights": weights(count, learner),
        "gradients": gradients(count),
        "optimizer": state * (1 - learner.optimizer_on_host),
    }
    clone = count.trained * WEIGHT_BYTES[learner.numbers]
    runtime = {"runtime (assumed)": RUNTIME_BYTES}
    phases: dict[str, dict[str, float]] = {}
    host = {"optimizer": state * learner.optimizer_on_host}
    if inputs.work.keeps_reference:
        host["reference weights"] = clone
    if engine.kind != "remote":
        phases["rollout"] = rollout = {**resident, **runtime}
        if inputs.work.draws_from_reference:
            rollout["policy, while the reference is swapped in"] = clone
        if engine.offload_learner:  # gradients are dropped, weights stay (mcore/offload.py)
            del rollout["gradients"]
            host[OFFLOADED_OPTIMIZER] = rollout.pop("optimizer")
        if learner.lora and engine.kind == "megatron":
            merged = parameters.adapted(inputs.model, layout, learner.lora)
            rollout["adapted layers, merged"] = merged * WEIGHT_BYTES[learner.numbers]
        rollout |= _engine_memory(inputs, sum(rollout.values()))
    if inputs.work.scores_reference:
        phases["scoring"] = {**resident, **runtime, "policy, while the reference is swapped in": clone}
    phases["train"] = {**resident, **runtime, **_training(inputs, count, stage)}
    return RankMemory(phases, {part: size for part, size in host.items() if size}, inputs.hardware.memory_bytes)


@dataclass(frozen=True)
class ServerMemory:
    """Memory of the fullest rank of a rollout server, and what its KV cache can hold."""

    layout: Layout
    rank: RankMemory
    """Its only phase is ``serve``."""
    kv_tokens: float
    """Tokens for whose keys and values there is room beside the rest, on the fullest rank."""
    wanted_tokens: int
    """``rollout.max_concurrent_tokens``."""


def server_memory(trainer: Inputs, server: Server) -> ServerMemory:
    """Memory of a rollout server.

    Args:
        trainer: the run's plan, whose hardware, precision and work the servers share.
        server: ``rollout.server``; one with TensorRT-LLM has the GPUs of ``rollout.trtllm``.
    """
    own = server.engine == "megatron"
    tensor = server.tensor_parallel_size if own else trainer.engine.gpus
    pipeline = server.pipeline_parallel_size
    layout = Layout(tensor, pipeline, expert=server.expert_parallel_size)
    inputs = replace(trainer, layout=layout, engine=replace(trainer.engine, kind=server.engine, gpus=tensor))
    stages = [parameters.rank_parameters(inputs.model, layout, stage) for stage in range(pipeline)]
    held = max(weights(count, inputs.learner) for count in stages)
    parts = {"runtime (assumed)": float(RUNTIME_BYTES), **({"weights": held} if own else {})}
    parts |= _engine_memory(inputs, sum(parts.values()))
    memory = RankMemory({"serve": parts}, {}, inputs.hardware.memory_bytes)
    free = memory.capacity - memory.peak + parts["KV cache"]
    each = kv_bytes_per_token(inputs, tensor, pipeline)
    return ServerMemory(layout, memory, max(0.0, free / each), inputs.engine.max_concurrent_tokens)


def _training(inputs: Inputs, count: Parameters, stage: int) -> dict[str, float]:
    """Memory of a training step besides weights and optimizer: activations, log-probs, the embedding's gradient."""
    layout, learner, batch = inputs.layout, inputs.learner, microbatch(inputs)
    in_flight = activations.in_flight(layout, stage, microbatches(inputs))
    kept = activations.stage_activations(inputs.model, layout, learner, batch, stage, in_flight)
    found = {"activations": kept}
    if stage == layout.pipeline - 1:
        found["logits chunk and its gradients"] = logprobs(inputs, batch.tokens / layout.context)
    # The embedding's gradient is made when its micro-batch's activations are gone. A tied output layer's exists until
    # then, so that there are two.
    both = 0 if learner.lora else count.embedding * (2 if inputs.model.tied and layout.pipeline == 1 else 1)
    at_the_end = both * WEIGHT_BYTES[learner.numbers] + kept * (in_flight - 1) / in_flight
    if at_the_end > sum(found.values()):
        found["embedding's gradient, beyond the above"] = at_the_end - sum(found.values())
    return found


def _engine_memory(inputs: Inputs, resident: float) -> dict[str, float]:
    """Part -> bytes that the engine takes on the learner's GPUs while it generates."""
    model, layout, engine = inputs.model, inputs.layout, inputs.engine
    if engine.kind == "remote":
        return {}
    rows, number = rows_at_a_time(inputs), engine_number_bytes(inputs)
    if engine.kind == "megatron":
        cached = rows * inputs.work.max_sequence_tokens
        prefill = min(MAX_PREFILL_TOKENS, inputs.work.max_sequence_tokens * rows)
        ffn = model.ffn * (model.experts_per_token if model.experts else 1)
        width = 3 * model.hidden + (2 * (model.query + 2 * model.key_value) + 3 * ffn) / layout.tensor
        if layout.expert > layout.tensor:  # the rows of all engines that decode in step, and their sum over experts
            width += 2 * model.hidden * layout.expert // layout.tensor
        logits = rows * model.vocabulary * (number + 8)  # gathered logits, then float32 ones and their softmax
        return {
            "KV cache": cached * kv_bytes_per_token(inputs, layout.tensor, layout.pipeline),
            "engine": prefill * width * number + logits,
        }
    whole = parameters.whole(model).total * number / engine.gpus
    fixed = whole + TRTLLM_WORKSPACE_BYTES + 2 * engine.refit_bucket_bytes
    free = max(0.0, inputs.hardware.memory_bytes - resident - fixed)
    wanted = engine.max_concurrent_tokens * kv_bytes_per_token(inputs, engine.gpus, 1)
    return {"KV cache": min(wanted, engine.kv_cache_fraction * free), "engine": fixed}
