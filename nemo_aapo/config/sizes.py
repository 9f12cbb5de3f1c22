"""What depends on the model and on the number of ranks: the derived sizes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from nemo_aapo.config.precision import check_widths, pad_multiple
from nemo_aapo.config.schema import Config
from nemo_aapo.errors import ConfigError

MAX_ROUTED_EXPERTS = 255
"""A route is one byte, one of whose values says that there is none (``types.NO_ROUTE``)."""


@dataclass(frozen=True)
class Experts:
    """Of a feed-forward layer that is a choice of experts."""

    count: int
    per_token: int
    """How many of them a token is sent to."""
    ffn_hidden_size: int
    """Units of one expert."""


@dataclass(frozen=True)
class ModelShape:
    """What the layout depends on, from the model's ``config.json``."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    vocab_size: int
    tied_embeddings: bool
    max_position_embeddings: int
    experts: Experts | None = None
    """None: every feed-forward layer is dense, of ``ffn_hidden_size`` units. Otherwise no layer is."""
    not_decoded: str | None = None
    """What of its layers the megatron engine's decoder does not know; None: it knows all."""


@dataclass(frozen=True)
class Sizes:
    """The derived sizes, and the arithmetic that led to them."""

    world_size: int
    data_parallel_size: int
    """Copies of the model, each of which generates: those that share sequences in training counted one by one."""
    prompts_per_rank: int
    completions_per_step: int
    max_sequence_tokens: int
    arithmetic: tuple[str, ...] = field(default=())


def prompts_drawn(config: Config) -> int:
    """Prompts whose completions are generated for one step; ``prompts_per_step`` of them are trained on."""
    return math.ceil(config.prompts_per_step * (config.rollout.oversample or 1.0))


def derive(config: Config, shape: ModelShape, world_size: int) -> Sizes:
    """Check the layout against model and ranks, and work out every other size.

    Raises:
        ConfigError: what does not divide, with both numbers.
    """
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    cp, ep = config.model.context_parallel_size, config.model.expert_model_parallel_size
    _check_engine(config, shape)
    if problem := undivided(shape, tp, pp, ep) or _experts_problem(config, shape) or _adapters_problem(config, shape):
        raise ConfigError(f"model.{problem}")
    check_widths(config, _widths(shape, tp))
    edges = config.precision.num_layers_at_start_in_bf16, config.precision.num_layers_at_end_in_bf16
    if max(edges) > shape.num_layers // pp:
        raise ConfigError(
            f"precision.num_layers_at_start_in_bf16={edges[0]}, num_layers_at_end_in_bf16={edges[1]}: a pipeline stage "
            f"has {shape.num_layers // pp} layers, and bf16 ones must lie within the first and the last"
        )
    asked = config.trainer.num_nodes * config.trainer.devices
    if world_size != asked:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes} x trainer.devices={config.trainer.devices} = {asked} ranks, "
            f"but {world_size} were started: start them by scripts/launch.py, or set trainer.devices"
        )
    parts, product = f"tensor {tp} x pipeline {pp}", tp * pp * cp
    if cp > 1:
        parts += f" x context {cp}"
    if world_size % product:
        raise ConfigError(
            f"{world_size} ranks can't be cut into groups of {parts} = {product}: "
            "change trainer.devices, trainer.num_nodes or the model's parallel sizes"
        )
    if world_size // pp % ep:
        raise ConfigError(
            f"model.expert_model_parallel_size={ep} does not divide the {world_size // pp} ranks of a pipeline stage "
            f"({world_size} ranks / pipeline {pp}), over which the experts of its layers are distributed"
        )
    dp = world_size // product
    copies = dp * cp
    if config.prompts_per_step % copies:
        which = f"the data-parallel size {dp}"
        if cp > 1:
            which += f" x model.context_parallel_size {cp} = {copies} copies of the model, each of which generates"
        raise ConfigError(f"prompts_per_step={config.prompts_per_step} is not divisible by {which}")
    longest = _longest_sequence(config, shape)
    per_rank = config.prompts_per_step // copies
    completions = config.prompts_per_step * config.group_size
    updates = config.algorithm.updates_per_rollout
    place = "data-parallel rank" if cp == 1 else "copy of the model"
    generating = [f"copies of the model = data-parallel size {dp} x context {cp} = {copies}: each generates"] * (cp > 1)
    return Sizes(
        world_size=world_size,
        data_parallel_size=copies,
        prompts_per_rank=per_rank,
        completions_per_step=completions,
        max_sequence_tokens=longest,
        arithmetic=(
            f"data-parallel size = {world_size} ranks / ({parts}) = {dp}",
            *generating,
            f"completions per rollout = prompts_per_step {config.prompts_per_step} x group_size {config.group_size} = "
            f"{completions}, {per_rank} prompts on each {place}, {updates} optimizer step(s) on them",
            f"longest sequence = {config.data.max_prompt_tokens} prompt + {config.rollout.max_new_tokens} new = "
            f"{longest} tokens; a micro-batch holds at least {config.max_tokens_per_microbatch // longest} such",
        ),
    )


def _check_engine(config: Config, shape: ModelShape) -> None:
    """Refuse an engine that can't have the model, or not on the layout.

    Raises:
        ConfigError: which, and why.
    """
    tp = config.model.tensor_model_parallel_size
    cp, ep = config.model.context_parallel_size, config.model.expert_model_parallel_size
    if config.rollout.engine == "remote":
        check_server_layout(config, shape)
    if config.rollout.engine == "megatron":
        _require_decoded("rollout.engine", shape)
    if config.rollout.engine == "trtllm":
        _check_trtllm_heads(config, shape)
    if config.rollout.engine == "plain" and (cp > 1 or ep > tp):
        raise ConfigError(
            f"rollout.engine=plain with model.context_parallel_size={cp}, model.expert_model_parallel_size={ep} and "
            f"model.tensor_model_parallel_size={tp}: ranks that generate each for itself would have to take every "
            "forward pass together. Use rollout.engine=megatron or remote, or cut neither sequences nor experts so"
        )


def _check_trtllm_heads(config: Config, shape: ModelShape) -> None:
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    gpus = config.rollout.trtllm.tensor_parallel_size or tp * pp
    if shape.num_attention_heads % gpus:
        raise ConfigError(
            f"rollout.trtllm.tensor_parallel_size={gpus} (null: tensor {tp} x pipeline {pp}): TensorRT-LLM cuts each "
            f"layer over so many GPUs, which do not divide the model's {shape.num_attention_heads} attention heads"
        )


def check_server_layout(config: Config, shape: ModelShape) -> None:
    """Refuse what a rollout server's model can't be cut into, or what it does not decode.

    Raises:
        ConfigError: names the sizes that do not divide, or what of the model is not known.
    """
    server = config.rollout.server
    if server.engine == "megatron":
        _require_decoded("rollout.server.engine", shape)
    tp, pp, ep = server.tensor_parallel_size, server.pipeline_parallel_size, server.expert_parallel_size
    if server.engine == "trtllm" and tp * pp * ep > 1:
        raise ConfigError(
            "rollout.server.tensor_parallel_size, pipeline_parallel_size and expert_parallel_size are those of "
            "engine=megatron; rollout.trtllm.tensor_parallel_size says how many GPUs TensorRT-LLM takes"
        )
    if server.engine == "trtllm":
        _check_trtllm_heads(config, shape)
    if tp % ep:
        raise ConfigError(
            f"rollout.server.expert_parallel_size={ep}: the experts of a layer are shared by its tensor-parallel "
            f"ranks, rollout.server.tensor_parallel_size={tp}, which it does not divide"
        )
    if problem := undivided(shape, tp, pp, ep):
        raise ConfigError(f"rollout.server.{problem.replace('_model_parallel', '_parallel', 1)}")


def _require_decoded(setting: str, shape: ModelShape) -> None:
    """Refuse a model that Megatron's engine does not decode; ``setting`` names that engine."""
    if shape.not_decoded:
        raise ConfigError(
            f"{setting}=megatron does not decode {shape.not_decoded}, which a {shape.architecture} has. Use "
            "rollout.engine=plain, which samples whatever trains, slowly"
        )


def with_routes_decided(config: Config, shape: ModelShape) -> Config:
    """The configuration with ``rollout.replay_routes`` decided for a model; null stays for one without experts.

    Raises:
        ConfigError: it has no effect, or can't be had.
    """
    rollout = config.rollout
    asked, engine = rollout.replay_routes, rollout.engine
    if shape.experts is None:
        if asked is not None:
            raise ConfigError(f"rollout.replay_routes={str(asked).lower()} has no effect: the model has no experts")
        return config
    records = engine == "megatron" or (engine == "remote" and rollout.server.engine == "megatron")
    if asked and not records:
        raise ConfigError(
            f"rollout.replay_routes=true with rollout.engine={engine}, rollout.server.engine={rollout.server.engine}: "
            "only Megatron's engine, in process or on servers, says which experts it sent a token to; leave it at null"
        )
    decided = records if asked is None else asked
    if decided and shape.experts.count > MAX_ROUTED_EXPERTS:
        raise ConfigError(
            f"rollout.replay_routes: a route is one byte, which tells {MAX_ROUTED_EXPERTS} experts apart and not the "
            f"model's {shape.experts.count}: set it to false"
        )
    if decided and rollout.max_lag is not None:
        raise ConfigError(
            f"rollout.max_lag={rollout.max_lag} with rollout.replay_routes={'true' if asked else 'null'}: keys and "
            "values by other weights may have been sent to other experts than those recorded. Set "
            "rollout.replay_routes=false, or use rollout.async_depth"
        )
    if decided and rollout.replay is not None:
        raise ConfigError(
            f"rollout.replay={rollout.replay}: the experts that tokens were sent to are not kept with rollouts. Set "
            "rollout.replay_routes=false: losses are then those of the run but for tokens that are routed otherwise"
        )
    return dataclasses.replace(config, rollout=dataclasses.replace(rollout, replay_routes=decided))


def _longest_sequence(config: Config, shape: ModelShape) -> int:
    """Tokens of the longest sequence, which model and micro-batch can hold."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > shape.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} = {longest} exceeds the {shape.max_position_embeddings} positions of the "
            "model (max_position_embeddings): lower them"
        )
    multiple = pad_multiple(config)
    if -(-longest // multiple) * multiple > config.max_tokens_per_microbatch:
        raise ConfigError(
            f"max_tokens_per_microbatch={config.max_tokens_per_microbatch} can't hold one sequence of {longest} tokens "
            f"padded to a multiple of {multiple} (precision={config.precision.name}, sequence and context parallelism)"
        )
    return longest


def _widths(shape: ModelShape, tp: int) -> dict[str, int]:
    """Dimensions of one rank's linear layers."""
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    return {
        "hidden size": shape.hidden_size,
        "query, key and value size of a rank": heads * shape.head_size // tp,
        "attention output of a rank": shape.num_attention_heads * shape.head_size // tp,
        **(
            {"units of an expert": shape.experts.ffn_hidden_size}
            if shape.experts
            else {"feed-forward units of a rank": shape.ffn_hidden_size // tp}
        ),
    }


def _experts_problem(config: Config, shape: ModelShape) -> str | None:
    """What of the configuration does not go with the model's experts, or without any; None: all of it goes."""
    model = config.model
    recomputed = set(model.recompute_modules) if model.recompute_granularity == "selective" else set()
    if shape.experts is None:
        if "moe" in recomputed:
            return f"recompute_modules={list(model.recompute_modules)}: the model has no experts; its layers are mlp"
        return None
    if "mlp" in recomputed:
        return (
            f"recompute_modules={list(model.recompute_modules)}: mlp recomputes dense layers, of which a model of "
            "experts has none; name moe"
        )
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        return (
            f"tensor_model_parallel_size={model.tensor_model_parallel_size} of a model with experts needs "
            "model.sequence_parallel=true: otherwise each tensor-parallel rank would send every token to the experts"
        )
    expert, tensor = model.expert_model_parallel_size, model.tensor_model_parallel_size
    if config.rollout.engine == "megatron" and max(expert, tensor) % min(expert, tensor):
        return (
            f"expert_model_parallel_size={expert} with model.tensor_model_parallel_size={tensor}: the rollout engine "
            "in process needs one of them to divide the other"
        )
    adapted = sorted({"linear_fc1", "linear_fc2"} & set(model.lora.target_modules)) if model.lora else []
    if model.lora and adapted:
        return (
            f"lora.target_modules={list(model.lora.target_modules)}: {', '.join(adapted)} are experts here, and "
            "adapters on experts depend on the layout (Megatron-Bridge 0.3.1). Use [linear_qkv, linear_proj]"
        )
    return None


def _adapters_problem(config: Config, shape: ModelShape) -> str | None:
    """Why adapters where they are asked for would not be those of ``peft``; None: they are, or there are none."""
    lora = config.model.lora
    normed = sorted({"linear_proj", "linear_fc2"} & set(lora.target_modules)) if lora else []
    if lora and normed and shape.architecture == "Gemma3ForCausalLM":
        return (
            f"lora.target_modules={list(lora.target_modules)}: {', '.join(normed)} of Gemma 3 are followed by a norm, "
            "and Megatron-Bridge adds an adapter after it. Use [linear_qkv, linear_fc1]"
        )
    return None


def undivided(
    shape: ModelShape, tensor_parallel_size: int, pipeline_parallel_size: int, expert_parallel_size: int = 1
) -> str | None:
    """What of a model the parallel sizes do not divide, beginning with the setting; None if they divide all of it.

    An expert is whole on its rank, whatever the tensor-parallel size.
    """
    if shape.architecture == "OlmoeForCausalLM" and tensor_parallel_size > 1:
        return (
            f"tensor_model_parallel_size={tensor_parallel_size}: OLMoE's norms of query and key are of all heads, "
            "which stay on one rank. Cut its experts instead (expert_model_parallel_size)"
        )
    if shape.experts is None:
        if expert_parallel_size > 1:
            return f"expert_model_parallel_size={expert_parallel_size}: a {shape.architecture} has no experts"
        feed_forward = ("tensor_model_parallel_size", tensor_parallel_size, "feed-forward units", shape.ffn_hidden_size)
    else:
        feed_forward = ("expert_model_parallel_size", expert_parallel_size, "experts", shape.experts.count)
    for key, number, what, parts in (
        ("tensor_model_parallel_size", tensor_parallel_size, "attention heads", shape.num_attention_heads),
        ("tensor_model_parallel_size", tensor_parallel_size, "key-value groups", shape.num_query_groups),
        feed_forward,
        ("pipeline_model_parallel_size", pipeline_parallel_size, "layers", shape.num_layers),
    ):
        if parts % number:
            return f"{key}={number} does not divide the model's {parts} {what}"
    return None
