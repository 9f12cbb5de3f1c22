"""Weights that are not those of the model are refused by name, from the headers of their files, in whatever form."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemo_aapo import lines
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import ARCHITECTURES, read_model_dir, shape_of
from nemo_aapo.models.weights import EMBEDDING, OUTPUT, expected_tensors
from nemo_aapo.run.identity import identity_of
from nemo_aapo.utils.safetensors import INDEX, WEIGHTS, tensor_headers
from tests.tiny_models import SIZES, make_config, save_empty_model, save_headers

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def shapes_of(model: Path) -> dict[str, tuple[int, ...]]:
    return {name: header.shape for name, header in tensor_headers(model).items()}


def rewrite(model: Path, change=lambda shapes: shapes, **dtypes: str) -> None:
    """The same file with other tensors."""
    save_headers(model / WEIGHTS, change(shapes_of(model)), **dtypes)


def configure(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def shard(model: Path, **index) -> None:
    """Cut the file in two with an index, some of whose entries are other ones."""
    shapes = shapes_of(model)
    names = sorted(shapes)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_headers(model / file, {name: shapes[name] for name in half})
    place = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    place |= {name.replace("__", "."): file for name, file in index.items()}
    place = {name: file for name, file in place.items() if file}
    (model / INDEX).write_text(json.dumps({"weight_map": place}))
    (model / WEIGHTS).unlink()


def without(*ends: str):
    return lambda shapes: {name: size for name, size in shapes.items() if not name.endswith(ends)}


def renamed(change):
    return lambda shapes: {change(name): size for name, size in shapes.items()}


def added(**more):
    return lambda shapes: {**shapes, **{name.replace("__", "."): size for name, size in more.items()}}


REFUSED = {
    "missing": (
        lambda m: rewrite(m, without("up_proj.weight")),
        "missing: model.layers.0.mlp.up_proj.weight, .* and 1 m",
    ),
    "bias that is missing": (
        lambda m: rewrite(m, without("q_proj.bias")),
        r"missing: model.layers.0.self_attn.q_proj.bi",
    ),
    "bias without a place": (
        lambda m: rewrite(m, added(model__layers__0__self_attn__o_proj__bias=(64,))),
        "without a place: model.layers.0.self_attn.o_proj.bias.*attention_bias",
    ),
    "a layer more": (lambda m: configure(m, num_hidden_layers=3), "without a place: .*num_hidden_layers=3"),
    "a layer less": (lambda m: configure(m, num_hidden_layers=5), "missing: model.layers.4.input_layernorm.weight"),
    "a wrapper's names": (
        lambda m: rewrite(m, renamed("module.{}".format)),
        "module.model.embed_tokens.weight should be",
    ),
    "a vision model's names": (
        lambda m: rewrite(m, renamed(lambda name: name.replace("model.", "model.language_model."))),
        "model.language_model.embed_tokens.weight should be",
    ),
    "another shape": (
        lambda m: rewrite(m, added(**{DOWN.replace(".", "__"): (128, 64)})),
        r"down_proj.weight is \[128, 64\] where config.json makes it \[64, 128\]",
    ),
    "another vocabulary": (
        lambda m: configure(m, vocab_size=99),
        r"embed_tokens.weight is \[100, 64\] where .*\[99, 64\]",
    ),
    "FP8 codes": (lambda m: rewrite(m, dtype="F8_E4M3"), "dtype F8_E4M3 .*can't be trained or converted"),
    "one int8 tensor": (lambda m: rewrite(m, **{DOWN.replace(".", "__"): "I8"}), rf"dtype I8 \({DOWN}\)"),
    "quantized, as config.json says": (
        lambda m: (rewrite(m, dtype="U8"), configure(m, quantization_config={"quant_method": "bitsandbytes"})),
        r"dtype U8 .*says that they are quantized \(bitsandbytes\)",
    ),
    "packed": (
        lambda m: rewrite(
            m,
            added(model__layers__0__mlp__down_proj__qweight=(8, 64)),
            **{"model__layers__0__mlp__down_proj__qweight": "I32"},
        ),
        r"dtype I32 \(model.layers.0.mlp.down_proj.qweight\)",
    ),
    "scales of codes": (
        lambda m: rewrite(m, added(model__layers__0__mlp__down_proj__weight_scale_inv=(1, 1))),
        "without a place: model.layers.0.mlp.down_proj.weight_scale_inv",
    ),
    "no output layer": (
        lambda m: rewrite(m, without(OUTPUT)),
        "missing: lm_head.weight. With tie_word_embeddings=false",
    ),
    "two sets": (
        lambda m: (m / INDEX).write_text(json.dumps({"weight_map": {NORM: SHARDS[0]}})),
        "two sets of weights",
    ),
    "two sets, one without index": (
        lambda m: (m / SHARDS[0]).write_bytes(b""),
        "two sets of weights, .* and model-00001",
    ),
    "index of a missing file": (
        lambda m: (shard(m), (m / SHARDS[1]).unlink()),
        "names files that are not there: model-00002-of-00002",
    ),
    "index with a tensor too many": (
        lambda m: shard(m, model__layers__9__bias=SHARDS[0]),
        "says that model.layers.9.bias is in model-00001-of-00002.safetensors, which lacks it",
    ),
    "index with a tensor elsewhere": (
        lambda m: shard(m, **{NORM.replace(".", "__"): SHARDS[0]}),
        rf"says that {NORM} is in {SHARDS[0]}, which lacks it",
    ),
    "index without a tensor": (lambda m: shard(m, **{NORM.replace(".", "__"): ""}), f"does not name {NORM}"),
    "index that leads elsewhere": (lambda m: shard(m, more="../x.safetensors"), "names of files beside it"),
    "index cut off": (lambda m: (shard(m), (m / INDEX).write_text('{"weight_map": ')), "Half-written"),
    "index of another form": (lambda m: (shard(m), (m / INDEX).write_text("[]")), "no JSON object with a weight_map"),
    "empty": (lambda m: (m / WEIGHTS).write_bytes(b""), "not a whole safetensors file"),
    "a pointer of Git LFS": (
        lambda m: (m / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n"),
        "git lfs pull",
    ),
    "pickled only": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), "Pickled weights"),
    "holes between tensors": (
        lambda m: (m / WEIGHTS).write_bytes(
            (m / WEIGHTS).read_bytes().replace(b'"data_offsets": [0, ', b'"data_offsets": [1, ')
        ),
        "not a whole safetensors file .*can't lie at bytes",
    ),
    "no size": (lambda m: configure(m, hidden_size=None), "hidden_size=None, where a number"),
    "a size that is none": (lambda m: configure(m, num_attention_heads="4"), "num_attention_heads='4', where a number"),
    "no object": (lambda m: (m / "config.json").write_text("[]"), "not a model's configuration"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_are_not_the_models_are_refused_by_name_within_a_second(tmp_path, name):
    damage, message = REFUSED[name]
    model = save_empty_model(tmp_path / "model")
    damage(model)
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        read_model_dir(str(model))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "change",
    [
        shard,
        lambda m: (m / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(shapes_of(m), WEIGHTS)})),
        lambda m: rewrite(m, added(model__layers__0__self_attn__rotary_emb__inv_freq=(8,))),
        lambda m: rewrite(m, dtype="F16"),
        lambda m: rewrite(m, **{NORM.replace(".", "__"): "F32"}),
        lambda m: configure(m, quantization_config={"quant_method": "fp8"}),  # of weights that are numbers all the same
        lambda m: configure(m, tie_word_embeddings=True),  # with a copy of the embedding
        lambda m: (configure(m, tie_word_embeddings=True), rewrite(m, without(OUTPUT))),
        lambda m: (m / "adapter_model.safetensors").write_bytes(b"what only peft reads"),
        lambda m: (m / "pytorch_model.bin").touch(),
    ],
)
def test_weights_that_are_the_models_pass_in_whatever_files(tmp_path, change):
    model = save_empty_model(tmp_path / "model")
    change(model)
    assert read_model_dir(str(model)).num_layers == 4
    assert identity_of(make_config(model))["model.path"] != str(model)


@pytest.mark.parametrize(
    ("where", "size"), [(0, (100, 64)), (99 * 128 + 127, (100, 64)), (0, (101, 64))], ids=["first", "last", "shape"]
)
def test_an_output_layer_of_its_own_in_a_model_that_ties_it_is_refused(tmp_path, where, size):
    model = save_empty_model(tmp_path / "model", tie_word_embeddings=True)
    rewrite(model, added(lm_head__weight=size))
    data = bytearray((model / WEIGHTS).read_bytes())
    data[len(data) - 2 * size[0] * size[1] + where] = 1
    (model / WEIGHTS).write_bytes(data)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings\), but lm_head.weight is another matrix"):
        read_model_dir(str(model))


@pytest.mark.parametrize("left_out", [(), ("num_key_value_heads",), ("head_dim", "tie_word_embeddings")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_that_are_asked_for_are_those_of_transformers(architecture, left_out):
    import torch
    import transformers

    sizes = {**SIZES, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 24, "tie_word_embeddings": True}
    if lines.installed() is lines.NEWEST and architecture in ("Qwen3MoeForCausalLM", "OlmoeForCausalLM"):
        pytest.skip("transformers 5 has the experts of a layer in one tensor, in memory")
    if architecture == "NemotronForCausalLM" and "num_key_value_heads" in left_out:
        pytest.skip("transformers 4.57 can't make such a model itself")
    written = {key: value for key, value in sizes.items() if key not in left_out}
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**written))
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        there.pop(OUTPUT)
    assert expected_tensors(shape_of({**written, "architectures": [architecture]})) == there
    assert EMBEDDING in there


@pytest.mark.parametrize("of_buffer", ["F32", "F64"])
def test_the_dtype_of_buffers_that_are_no_weights_does_not_decide_what_weights_are_written_in(tmp_path, of_buffer):
    import torch

    from nemo_aapo.models.writer import weights_dtype

    model = save_empty_model(tmp_path / "model")
    buffer = "model__layers__0__self_attn__rotary_emb__inv_freq"
    rewrite(model, added(**{buffer: (8,)}), dtype="F16", **{buffer: of_buffer})
    assert weights_dtype(model) == torch.float16
    rewrite(model, dtype="F16", **{NORM.replace(".", "__"): "F32"})
    assert weights_dtype(model) == torch.float32
