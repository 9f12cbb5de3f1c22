"""Whether the weights of a model directory are those that its Megatron twin takes: names, shapes, dtypes. No torch.

The tensors are written down here for each family, so that every command can compare them with the headers of the files
in milliseconds, before anything is built; a test holds them equal to the names that the weight map covers. What has no
place in the map would get lost, what is missing would stay random, and codes of quantized weights would be numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from nemo_aapo.config import ModelShape
from nemo_aapo.errors import ConfigError
from nemo_aapo.utils.safetensors import TensorHeader, read_header, tensor_headers

FLOATS = ("F32", "BF16", "F16")
"""Dtypes that weights may have."""
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
"""Last parts of names in old weight files that are no weights: they follow from ``config.json``."""
PIECE, PIECES = 64 * 1024, 64
"""Bytes of a piece, and the number of evenly spaced pieces, that tell whether two large tensors are equal."""
SHOWN = 3


def check_weights(directory: Path, config: Mapping[str, Any], shape: ModelShape) -> None:
    """Refuse a directory whose weights are not what the weight map takes.

    Reads headers only, but for a second copy of tied embeddings, of which it reads 4 MiB.

    Args:
        config: of ``config.json``.
        shape: what it says of sizes.

    Raises:
        ConfigError: as ``tensor_headers``; or the names that are missing, have no place, or another shape or dtype.
    """
    every = tensor_headers(directory)
    headers = own_tensors(every, shape)
    if codes := {header.dtype for header in headers.values()} - set(FLOATS):
        coded = [name for name, header in headers.items() if header.dtype in codes]
        raise ConfigError(
            f"model.path={directory}: weights of dtype {', '.join(sorted(codes))} ({_some(coded)}) can't be trained or "
            f"converted{_quantized(config)}: take the model in {', '.join(FLOATS)}"
        )
    expected = expected_tensors(shape)
    if OUTPUT in every and OUTPUT not in headers and EMBEDDING in headers:
        _require_same(directory, every)
    if problem := _misfit(headers, expected, shape):
        raise ConfigError(
            f"model.path={directory}: the weights are not those of a {shape.architecture} of {shape.num_layers} layers "
            f"as config.json describes it; {problem}"
        )


def _misfit(
    headers: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]], shape: ModelShape
) -> str | None:
    """Which tensors are missing, have no place or another shape; None: they fit."""
    missing, extra = expected.keys() - headers.keys(), headers.keys() - expected.keys()
    different = [
        f"{name} is {list(headers[name].shape)} where config.json makes it {list(wanted)}"
        for name, wanted in expected.items()
        if name in headers and headers[name].shape != wanted
    ]
    problems = [
        *([f"missing: {_some(missing)}"] if missing else ()),
        *([f"without a place: {_some(extra)}"] if extra else ()),
        *([_some(different)] if different else ()),
    ]
    return "; ".join(problems) + _hint(missing, extra, shape) if problems else None


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the weight map takes of a model, and writes of it."""
    hidden = shape.hidden_size
    query, key = shape.num_attention_heads * shape.head_size, shape.num_query_groups * shape.head_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        **_feed_forward(shape),
    }
    if shape.architecture == "Qwen2ForCausalLM":
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if shape.architecture == "Gemma3ForCausalLM":
        layer |= {f"{place}_feedforward_layernorm.weight": (hidden,) for place in ("pre", "post")}
    if shape.architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"):
        layer |= {f"self_attn.{name}_norm.weight": (shape.head_size,) for name in ("q", "k")}
    norm_bias = {"model.norm.bias": (hidden,)} if shape.architecture == "NemotronForCausalLM" else {}
    if norm_bias:
        layer |= {f"{name}_layernorm.bias": (hidden,) for name in ("input", "post_attention")}
    if shape.architecture == "OlmoeForCausalLM":  # of all heads together
        sizes = hidden, hidden // shape.num_attention_heads * shape.num_query_groups
        layer |= {f"self_attn.{name}_norm.weight": (size,) for name, size in zip("qk", sizes, strict=True)}
    return {
        EMBEDDING: (shape.vocab_size, hidden),
        **{f"model.layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()},
        "model.norm.weight": (hidden,),
        **norm_bias,
        **({} if shape.tied_embeddings else {OUTPUT: (shape.vocab_size, hidden)}),
    }


def _feed_forward(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's feed-forward part: dense, or a router and experts."""

    def gated(prefix: str, units: int) -> dict[str, tuple[int, ...]]:
        hidden = shape.hidden_size
        sizes = {"gate": (units, hidden), "up": (units, hidden), "down": (hidden, units)}
        return {f"{prefix}.{name}_proj.weight": size for name, size in sizes.items()}

    if (experts := shape.experts) is None:
        whole = gated("mlp", shape.ffn_hidden_size)
        without_gate = shape.architecture == "NemotronForCausalLM"
        return {name: size for name, size in whole.items() if not (without_gate and "gate_proj" in name)}
    tensors: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts.count, shape.hidden_size)}
    for number in range(experts.count):
        tensors |= gated(f"mlp.experts.{number}", experts.ffn_hidden_size)
    return tensors


def own_tensors(headers: Mapping[str, TensorHeader], shape: ModelShape) -> dict[str, TensorHeader]:
    """The tensors of the files that are weights: no derived buffers, and no second copy of tied embeddings."""
    second = {OUTPUT} if shape.tied_embeddings else set()
    return {
        name: header for name, header in headers.items() if name not in second and not name.endswith(DERIVED_BUFFERS)
    }


def _require_same(directory: Path, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse an output layer that is said to be the embedding, and is another matrix."""
    one, other = headers[EMBEDDING], headers[OUTPUT]
    if (one.shape, one.dtype) != (other.shape, other.dtype) or _pieces(directory, one, EMBEDDING) != _pieces(
        directory, other, OUTPUT
    ):
        raise ConfigError(
            f"model.path={directory}: config.json ties the output layer to the embedding (tie_word_embeddings), but "
            f"{OUTPUT} is another matrix than {EMBEDDING}: set tie_word_embeddings to false, or remove {OUTPUT}"
        )


def _pieces(directory: Path, header: TensorHeader, name: str) -> list[bytes]:
    """Evenly spaced pieces of a tensor's bytes; up to 4 MiB all of it."""
    entries, begin = read_header(directory / header.file)
    start, stop = entries[name]["data_offsets"]
    with (directory / header.file).open("rb") as file:
        found = []
        for at in range(start, stop, max(PIECE, (stop - start) // PIECES)):
            file.seek(begin + at)
            found.append(file.read(min(PIECE, stop - at)))
    return found


def _quantized(config: Mapping[str, Any]) -> str:
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else None
    return f"; config.json says that they are quantized ({method})" if method else ""


def _hint(missing: Set[str], extra: Set[str], shape: ModelShape) -> str:
    """The likely cause, where the names show one."""
    if missing == {OUTPUT} and not extra:
        return ". With tie_word_embeddings=false the output layer is a tensor of its own"
    if extra and not missing and all(name.endswith(".bias") for name in extra):
        return f". The weight map of {shape.architecture} has no such biases (attention_bias, mlp_bias)"
    if extra and not missing and all(name.startswith("model.layers.") for name in extra):
        return f". Are there more layers than num_hidden_layers={shape.num_layers}?"
    embedding = next((name for name in sorted(extra) if name.endswith("embed_tokens.weight")), None)
    if EMBEDDING in missing and embedding:
        return f". {embedding} should be {EMBEDDING}: was it saved from a wrapper, or as part of another kind of model?"
    return ""


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
