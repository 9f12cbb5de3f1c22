"""What of a family is not computed, not decoded or not cut is refused by name, from small files and settings alone."""

from __future__ import annotations

import json

import pytest

from nemo_aapo.config import derive
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import read_model_dir, shape_of, twin_problem
from tests.tiny_models import SIZES, make_config

GEMMA3 = {"sliding_window": 8, "head_dim": 16, "model_type": "gemma3_text"}
KINDS = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "yarn"}}
TP2 = {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True, "trainer__devices": 2}
LORA = {"rank": 8, "alpha": 16, "target_modules": ["linear_qkv", "linear_proj"]}


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("Gemma3", {**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 gets lost"),
        ("Gemma3", {**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 gets lost"),
        ("Gemma3", {**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention=True gets lost"),
        ("Gemma3", {**GEMMA3, "sliding_window": None}, "sliding_window=null: Gemma 3's local layers have a window"),
        ("Gemma3", {**GEMMA3, "hidden_activation": "silu"}, "gelu_pytorch_tanh is computed here, whatever"),
        ("Nemotron", {"hidden_act": "gelu"}, "hidden_act=gelu: relu2 is computed here"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act=gelu: silu is computed here"),
        ("Gemma3", {**GEMMA3, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling of type yarn gets lost"),
        ("Gemma3", {**GEMMA3, "rope_parameters": KINDS}, "differ between kinds of layers"),
        ("Gemma", {"hidden_act": "gelu"}, "hidden_act=gelu: gelu_pytorch_tanh is computed here"),
        ("Mistral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of type linear gets lost"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 gets lost"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor gets lost"),
    ],
)
def test_a_setting_that_megatron_would_not_compute_is_named(family, values, reason):
    assert reason in str(twin_problem({**SIZES, "architectures": [f"{family}ForCausalLM"], **values}))


def test_two_rotary_bases_are_read_as_transformers_5_writes_them():
    written = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 1e4}}
    config = {**SIZES, **GEMMA3, "architectures": ["Gemma3ForCausalLM"], "rope_parameters": written}
    assert twin_problem(config) is None


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Nemotron", {}, r"rollout.engine=megatron does not decode LayerNorms .* rollout.engine=plain"),
        (
            "Nemotron",
            {"rollout__engine": "remote"},
            r"rollout.server.engine=megatron does not decode LayerNorms",
        ),
        ("Olmoe", TP2, "model.tensor_model_parallel_size=2: OLMoE's norms of query and key are of all heads"),
        ("Gemma3", {"model__lora": LORA}, "linear_proj of Gemma 3 are followed by a norm"),
        ("Gemma3", {"rollout__engine": "plain", "model__context_parallel_size": 2}, "take every forward pass together"),
    ],
)
def test_what_a_family_does_not_go_with_is_refused(family, settings, reason):
    shape = shape_of({**SIZES, "architectures": [f"{family}ForCausalLM"], "num_experts": 8 * (family == "Olmoe")})
    config = make_config("/m", **settings)
    with pytest.raises(ConfigError, match=reason):
        derive(config, shape, config.trainer.devices)


@pytest.mark.parametrize("family", ["GptOss", "Glm4Moe", "Gemma2", "Mixtral", "DeepseekV3"])
def test_a_family_that_is_not_built_is_refused_with_what_it_lacks(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "architectures": [f"{family}ForCausalLM"]}))
    with pytest.raises(ConfigError, match=rf"architecture {family}ForCausalLM \(.*; supported are Qwen2ForCausalLM"):
        read_model_dir(str(tmp_path))
