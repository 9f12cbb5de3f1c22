"""FLOPs of a step are those of what was computed: by the parameter count, without what was skipped or shared."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nemo_aapo.launch.world import Machine, decide
from nemo_aapo.run.step_metrics import GroupNumbers
from nemo_aapo.training.throughput import Throughput, rollout_flops, train_flops
from tests.tiny_models import make_config

PROMPT, LENGTHS = 10, (4, 6)
GENERATED, SECONDS = [(PROMPT, LENGTHS)], {"train": 2.0, "step": 4.0}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 96, "vocab_size": 1000, "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
MATRICES = 3 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
"""Numbers of the layers that a token is multiplied with: queries, keys and values, output, three of the MLP."""


def group(advantages=(1.0, -1.0)) -> GroupNumbers:
    nothing, none = np.zeros(2), np.zeros(2, bool)
    return GroupNumbers(
        nothing, {}, None, np.array(advantages), np.array(LENGTHS), none, none, nothing, nothing, none, PROMPT
    )


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return decide(make_config(str(tmp_path)), Machine(gpu=None))


def by_hand(tokens: float, pairs: float, scored: float) -> float:
    return 2 * MATRICES * tokens + 4 * pairs * 64 * 3 + 2 * scored * 1000 * 64


def with_model(config, **changed):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))


def test_training_is_three_passes_of_what_is_trained_on(config):
    inputs = Throughput(config, False)._inputs
    pairs, scored = (14**2 + 16**2) / 2, 10
    separate, shared = with_model(config, share_prompts=False), with_model(config, share_prompts=True)
    assert train_flops(separate, inputs, [group()], False) == pytest.approx(3 * by_hand(14 + 16, pairs, scored))
    assert train_flops(shared, inputs, [group()], False) == pytest.approx(3 * by_hand(10 + 4 + 6, pairs, scored))
    one = train_flops(separate, inputs, [group((1.0, np.nan))], False)
    assert one == pytest.approx(3 * by_hand(14, 14**2 / 2, 4))
    assert train_flops(separate, inputs, [group((0.0, 0.0))], False) == 0
    assert train_flops(separate, inputs, [group((0.0, 0.0))], True) == train_flops(separate, inputs, [group()], False)
    assert train_flops(separate, inputs, [group(), group((0.0, np.nan)), group()], False) == pytest.approx(
        2 * train_flops(separate, inputs, [group()], False)
    )


def test_a_rollout_is_one_pass_over_each_prompt_and_every_token(config):
    inputs = Throughput(config, False)._inputs
    pairs = 10**2 / 2 + 4 * 10 + 4**2 / 2 + 6 * 10 + 6**2 / 2
    assert rollout_flops(inputs, [(PROMPT, LENGTHS)]) == pytest.approx(by_hand(10 + 4 + 6, pairs, 10))


def test_metrics_are_those_of_a_rank(config):
    two = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, devices=2))
    one, half = (Throughput(c, False).metrics(GENERATED, [group()], SECONDS) for c in (config, two))
    assert half["tokens_per_second"] == one["tokens_per_second"] == 10 / 4
    assert half["tokens_per_second_per_rank"] == one["tokens_per_second_per_rank"] / 2 == 10 / 4 / 2
    assert half["tflops/train"] == pytest.approx(one["tflops/train"] / 2)
    assert one["tflops/step"] > one["tflops/train"] / 2 > 0
    assert 0.01 < one["memory/peak_gib"] < 1_000
    assert "mfu" not in one  # a CPU has no peak that is known


def test_a_model_that_the_planner_does_not_know_has_no_flops(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "architectures": ["Other"]}))
    found = Throughput(config, False).metrics(GENERATED, [group()], SECONDS)
    assert set(found) == {"tokens_per_second", "tokens_per_second_per_rank", "memory/peak_gib"}


def test_groups_that_are_left_out_were_generated_all_the_same(config):
    """``rollout.oversample``: three groups for a step of one."""
    one, three = (Throughput(config, False).metrics(GENERATED * n, [group()], SECONDS) for n in (1, 3))
    assert three["tokens_per_second"] == 3 * one["tokens_per_second"]
    assert three["tflops/train"] == one["tflops/train"]
    trained = one["tflops/train"] * SECONDS["train"] / SECONDS["step"]
    assert three["tflops/step"] - trained == pytest.approx(3 * (one["tflops/step"] - trained))
