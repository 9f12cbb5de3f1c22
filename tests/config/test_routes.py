"""Whether routes are replayed follows from the model and the engine, and what can't be had is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.config import Experts, digest, with_routes_decided
from nemo_aapo.config.sizes import derive
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import shape_of
from tests.tiny_models import make_config

SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 160}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
DENSE = shape_of({"architectures": ["Qwen3ForCausalLM"], **SIZES, **HEADS})
MIXTURE = dataclasses.replace(DENSE, experts=Experts(count=6, per_token=2, ffn_hidden_size=32))
REMOTE = {"rollout__engine": "remote", "rollout__remote__directory": "servers"}


@pytest.mark.parametrize(
    ("shape", "settings", "decided"),
    [
        (DENSE, {}, None),
        (MIXTURE, {}, True),
        (MIXTURE, {"rollout__replay_routes": False}, False),
        (MIXTURE, REMOTE, True),
        (MIXTURE, {**REMOTE, "rollout__server__engine": "trtllm"}, False),
        (MIXTURE, {"rollout__engine": "trtllm"}, False),
    ],
)
def test_routes_are_replayed_where_the_engine_records_them(shape, settings, decided):
    config = make_config("model", **settings)
    assert with_routes_decided(config, shape).rollout.replay_routes is decided
    assert with_routes_decided(with_routes_decided(config, shape), shape) == with_routes_decided(config, shape)
    if shape is DENSE:  # runs from before there was the setting go on
        assert digest(with_routes_decided(config, shape)) == digest(config)


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        (DENSE, {"rollout__replay_routes": True}, "the model has no experts"),
        (DENSE, {"rollout__replay_routes": False}, "the model has no experts"),
        (MIXTURE, {"rollout__replay_routes": True, "rollout__engine": "trtllm"}, "only Megatron's engine"),
        (
            MIXTURE,
            {**REMOTE, "rollout__max_lag": 2, "algorithm__importance_weight_cap": 2.0},
            "rollout.max_lag=2 with rollout.replay_routes=null",
        ),
        (MIXTURE, {"rollout__replay": "kept", "trainer__val_check_interval": 0}, "were sent to are not kept"),
        (dataclasses.replace(MIXTURE, experts=Experts(256, 2, 32)), {}, "255 experts apart and not the model's 256"),
    ],
)
def test_a_replay_that_can_not_be_had_is_refused(shape, settings, said):
    with pytest.raises(ConfigError, match=said):
        with_routes_decided(make_config("model", **settings), shape)


def test_experts_over_ranks_that_no_whole_copies_of_the_model_make_up_are_refused():
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 3, "sequence_parallel": True}
    changes = {f"model__{name}": value for name, value in layout.items()}
    with pytest.raises(ConfigError, match="one of them to divide the other"):
        derive(make_config("model", trainer__devices=6, prompts_per_step=6, **changes), MIXTURE, 6)
