"""What does not go with a model's experts, or without any, is refused by name from the configuration alone."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.config import Experts, ModelShape, derive
from nemo_aapo.errors import ConfigError
from tests.tiny_models import make_config

QWEN_30B_A3B = ModelShape(
    "Qwen3MoeForCausalLM", 48, 2048, 6144, 32, 4, 128, 151_936, False, 40_960, Experts(128, 8, 768)
)
DENSE = dataclasses.replace(QWEN_30B_A3B, architecture="Qwen3ForCausalLM", experts=None)


def config(**changes):
    names = {"ep": "expert", "tp": "tensor", "pp": "pipeline"}
    sizes = {f"model__{long}_model_parallel_size": changes.pop(key) for key, long in names.items() if key in changes}
    world = changes.pop("world", 1)
    return make_config("/m", trainer__devices=world, prompts_per_step=world, **sizes, **changes), world


SELECTIVE = {"model__recompute_granularity": "selective"}
LORA = {"rank": 8, "alpha": 16}


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (DENSE, {"ep": 2, "world": 2}, "expert_model_parallel_size=2: a Qwen3ForCausalLM has no experts"),
        (QWEN_30B_A3B, {"ep": 3, "world": 3}, "expert_model_parallel_size=3 does not divide the model's 128 experts"),
        (QWEN_30B_A3B, {"ep": 4, "world": 2}, "expert_model_parallel_size=4 does not divide the 2 ranks of a pipeline"),
        (QWEN_30B_A3B, {"ep": 4, "pp": 2, "world": 4}, r"the 2 ranks of a pipeline stage \(4 ranks / pipeline 2\)"),
        (QWEN_30B_A3B, {"tp": 2, "world": 2}, "tensor_model_parallel_size=2 .* needs model.sequence_parallel=true"),
        (QWEN_30B_A3B, SELECTIVE | {"model__recompute_modules": ["mlp"]}, "mlp recomputes dense layers.*name moe"),
        (DENSE, SELECTIVE | {"model__recompute_modules": ["moe"]}, "the model has no experts; its layers are mlp"),
        (QWEN_30B_A3B, {"model__lora": LORA | {"target_modules": ["linear_qkv", "linear_fc2"]}}, "linear_fc2 are exp"),
    ],
)
def test_what_does_not_go_with_experts_is_refused_by_name(shape, changes, message):
    with pytest.raises(ConfigError, match=message):
        derive(config(**changes)[0], shape, config(**changes)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"ep": 8, "world": 8},
        {"tp": 4, "ep": 8, "world": 8, "model__sequence_parallel": True},
        {"tp": 2, "pp": 2, "ep": 2, "world": 4, "model__sequence_parallel": True},
        {"model__lora": LORA | {"target_modules": ["linear_qkv", "linear_proj"]}},
        SELECTIVE | {"model__recompute_modules": ["core_attn", "moe"]},
    ],
)
def test_what_goes_with_them_passes(changes):
    made, world = config(**changes)
    assert derive(made, QWEN_30B_A3B, world).world_size == world
