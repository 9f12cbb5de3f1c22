"""What depends on the model and on the number of ranks: the derived sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_aapo.config.precision import check_widths, pad_multiple
from nemo_aapo.config.schema import Config
from nemo_aapo.errors import ConfigError


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


def derive(config: Config, shape: ModelShape, world_size: int) -> Sizes:
    """Check the layout against model and ranks, and work out every other size.

    Raises:
        ConfigError: what does not divide, with both numbers.
    """
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    cp = config.model.context_parallel_size
    if problem := undivided(shape, tp, pp):
        raise ConfigError(f"model.{problem}")
    check_widths(config, _widths(shape, tp))
    edges = config.precision.num_layers_at_start_in_bf16, config.precision.num_layers_at_end_in_bf16
    if max(edges) > shape.num_layers // pp:
        raise ConfigError(
            f"precision.num_layers_at_start_in_bf16={edges[0]}, num_layers_at_end_in_bf16={edges[1]}: a pipeline stage "
            f"has {shape.num_layers // pp} layers, and bf16 ones must lie within the first and the last"
        )
    if config.rollout.engine == "trtllm" and shape.num_attention_heads % (tp * pp):
        raise ConfigError(
            f"rollout.engine=trtllm cuts each layer over the {tp} x {pp} GPUs of a model-parallel group, which do not "
            f"divide the model's {shape.num_attention_heads} attention heads"
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
    dp = world_size // product
    copies = dp * cp
    if config.prompts_per_step % copies:
        which = f"the data-parallel size {dp}"
        if cp > 1:
            which += f" x model.context_parallel_size {cp} = {copies} copies of the model, each of which generates"
        raise ConfigError(f"prompts_per_step={config.prompts_per_step} is not divisible by {which}")
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
            f"padded to a multiple of {multiple} (precision={config.precision.name}, sequence parallelism)"
        )
    per_rank = config.prompts_per_step // copies
    completions = config.prompts_per_step * config.group_size
    updates = config.algorithm.updates_per_rollout
    return Sizes(
        world_size=world_size,
        data_parallel_size=copies,
        prompts_per_rank=per_rank,
        completions_per_step=completions,
        max_sequence_tokens=longest,
        arithmetic=(
            f"data-parallel size = {world_size} ranks / ({parts}) = {dp}",
            *([f"copies of the model = data-parallel size {dp} x context {cp} = {copies}, each generates"] if cp > 1 else []),
            f"completions per rollout = prompts_per_step {config.prompts_per_step} x group_size {config.group_size} = "
            f"{completions}, {per_rank} prompts on each {'copy' if cp > 1 else 'data-parallel rank'}, {updates} optimizer step(s) on them",
            f"longest sequence = {config.data.max_prompt_tokens} prompt + {config.rollout.max_new_tokens} new = "
            f"{longest} tokens; a micro-batch holds at least {config.max_tokens_per_microbatch // longest} such",
        ),
    )


def _widths(shape: ModelShape, tp: int) -> dict[str, int]:
    """Dimensions of one rank's linear layers."""
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    return {
        "hidden size": shape.hidden_size,
        "query, key and value size of a rank": heads * shape.head_size // tp,
        "attention output of a rank": shape.num_attention_heads * shape.head_size // tp,
        "feed-forward units of a rank": shape.ffn_hidden_size // tp,
    }


def undivided(shape: ModelShape, tensor_parallel_size: int, pipeline_parallel_size: int) -> str | None:
    """What of a model the parallel sizes do not divide, beginning with the setting; None if they divide all of it."""
    for key, number, what, parts in (
        ("tensor_model_parallel_size", tensor_parallel_size, "attention heads", shape.num_attention_heads),
        ("tensor_model_parallel_size", tensor_parallel_size, "key-value groups", shape.num_query_groups),
        ("tensor_model_parallel_size", tensor_parallel_size, "feed-forward units", shape.ffn_hidden_size),
        ("pipeline_model_parallel_size", pipeline_parallel_size, "layers", shape.num_layers),
    ):
        if parts % number:
            return f"{key}={number} does not divide the model's {parts} {what}"
    return None
