"""A model directory that can't work is refused before anything expensive, with what is wrong and where."""

from __future__ import annotations

import json
import shutil

import pytest

from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.utils.safetensors import model_digest as digest


@pytest.fixture
def model(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["qwen2"], tmp_path / "model")


def test_the_shape_is_read_without_loading_weights(model):
    shape = read_model_dir(str(model))
    assert (shape.num_layers, shape.num_attention_heads, shape.num_query_groups, shape.vocab_size) == (4, 4, 2, 160)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no such directory.*config\.json"):
        read_model_dir(str(tmp_path / "nowhere"))


def test_half_written_weights_are_refused(model):
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    for cut in (0, 5, 200, len(data) - 1):
        weights.write_bytes(data[:cut])
        with pytest.raises(ConfigError, match=r"model\.safetensors.*Half-written"):
            read_model_dir(str(model))


def test_a_missing_shard_is_named(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match="model-00002-of-00002"):
        read_model_dir(str(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel; supported are Qwen2ForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "sigmoid routers with a bias are not decoded here"),
        ({"architectures": ["MixtralForCausalLM"]}, "no map for its weights"),
    ],
)
def test_other_architectures_are_refused(model, change, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        read_model_dir(str(model))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true gets lost"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type yarn gets lost"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of type linear gets lost"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: dense layers among"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: dense layers among"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size=32: an expert that"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts=1: an expert that every token passes"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid': a router that scores otherwise"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5: .* Megatron would"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta contradict"),
    ],
)
def test_settings_that_megatron_computes_otherwise_are_refused(tiny_models, tmp_path, name, change, message):
    model = shutil.copytree(tiny_models[name], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)  # where transformers 5 wrote it
    (model / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        read_model_dir(str(model))


@pytest.mark.parametrize("change", [{"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}])
def test_settings_that_change_nothing_pass(model, change):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "use_sliding_window": False, **change}))
    assert read_model_dir(str(model)).num_layers == 4


def test_a_config_that_is_cut_off_is_refused(model):
    (model / "config.json").write_text('{"architectures": ["Qwen2For')
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        read_model_dir(str(model))


def test_the_digest_changes_with_one_byte_of_the_weights(model):
    before = digest(str(model))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert digest(str(model)) != before
