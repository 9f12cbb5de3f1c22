"""Bounds of time and FLOPs of a step: closed formulas, and what an H200 showed."""

from __future__ import annotations

import pytest

from nemo_aapo.planning import compute, hardware, parameters
from tests.planning.planned import made_inputs


def test_decoding_is_bounded_by_reading_weights_and_cache():
    """Qwen2.5-7B on an H200 at context 1500: 3.2 ms a token alone, 33,000 tokens/s at 256 rows."""
    inputs, rates = made_inputs("model=Qwen2.5-7B", "hardware=h200"), hardware.KNOWN["h200"].peak
    assert compute.decode_step_seconds(inputs, rates, 1, 1500) == pytest.approx(3.2e-3, rel=0.08)
    assert 256 / compute.decode_step_seconds(inputs, rates, 256, 1500) == pytest.approx(33e3, rel=0.08)
    assert compute.straggler_seconds(inputs, rates, 4096) == pytest.approx(13, rel=0.08)


@pytest.mark.parametrize(
    ("name", "precision", "seconds"),
    [
        ("Qwen2.5-1.5B", "bf16", 0.581),
        ("Qwen2.5-1.5B", "fp8_tensorwise", 0.477),
        ("Qwen2.5-0.5B", "bf16", 0.249),
        ("Qwen2.5-0.5B", "fp8_tensorwise", 0.276),
    ],
)
def test_a_training_step_on_an_h200_took_longer_than_its_bound(name, precision, seconds):
    """Seconds of an optimizer step on 32 sequences of 512 + 512 tokens, as measured (see ``MEASURED_PEAK_GIB``)."""
    lengths = ("data.max_prompt_tokens=512", "rollout.max_new_tokens=512", "max_tokens_per_microbatch=32768")
    words = (f"precision={precision}", "prompts_per_step=4", "group_size=8")
    inputs = made_inputs(f"model={name}", "hardware=h200", *lengths, *words)
    for rates in (inputs.hardware.peak, inputs.hardware.measured):
        assert seconds / 5 < compute.train_phase(inputs, rates).seconds < seconds


def test_training_takes_six_flops_for_each_parameter_and_token():
    inputs = made_inputs("model=Qwen2.5-7B", "data.max_prompt_tokens=64", "rollout.max_new_tokens=64")
    count = parameters.whole(inputs.model)
    each = compute.train_flops(inputs).total / inputs.work.tokens
    assert each == pytest.approx(6 * (count.total - count.embedding), rel=0.05)
    assert compute.score_flops(inputs).total / inputs.work.tokens == pytest.approx(each / 3, rel=0.05)


def test_gradients_cross_the_network_only_where_data_parallel_ranks_lie_on_several_nodes():
    words = ("model=Qwen2.5-7B", "model.tensor_model_parallel_size=4", "model.sequence_parallel=true")
    seconds = {}
    for nodes, devices, more in ((1, 8, []), (2, 4, []), (2, 4, ["model.optim.overlap_grad_reduce=true"])):
        inputs = made_inputs(*words, f"trainer.num_nodes={nodes}", f"trainer.devices={devices}", *more)
        phase = compute.train_phase(inputs, hardware.KNOWN["h100"].peak)
        seconds[nodes, devices, len(more)] = phase.seconds
    assert seconds[1, 8, 0] < seconds[2, 4, 1] < seconds[2, 4, 0]


def test_an_aapo_step_needs_no_scoring_and_grpos_does():
    names = ("algorithm=aapo", "algorithm=gpg", "algorithm=grpo")
    passes = [made_inputs("model=Qwen2.5-7B", name).work.scoring_passes for name in names]
    assert passes == [0, 0, 1]
    assert made_inputs("model=Qwen2.5-7B", "algorithm=grpo", "algorithm.updates_per_rollout=2").work.scoring_passes == 2


def test_mean_lengths_are_an_input_and_default_to_the_limits():
    longest = made_inputs("model=Qwen2.5-7B").work
    assert (longest.prompt_tokens, longest.completion_tokens) == (512, 1024)
    shorter = made_inputs("model=Qwen2.5-7B", "mean_prompt_tokens=100", "mean_completion_tokens=300.5").work
    assert shorter.tokens == 128 * 400.5


def test_fresh_reference_rewards_cost_a_second_rollout_and_stored_ones_nothing():
    rates = hardware.KNOWN["h100"].peak
    steps = {}
    for name in ("aapo", "aapo_paper"):
        inputs = made_inputs("model=Qwen2.5-7B", f"algorithm={name}")
        steps[name] = {phase.name: phase for phase in compute.step(inputs, rates)}
    rollout = steps["aapo"]["prefill"].tokens + steps["aapo"]["decode"].tokens
    assert steps["aapo"]["reference"].seconds == 0
    assert steps["aapo_paper"]["reference"].tokens == rollout
    assert steps["aapo_paper"]["reference"].seconds >= steps["aapo"]["decode"].seconds


def test_the_store_saves_what_prompts_that_come_again_would_cost():
    words = ("model=Qwen2.5-7B", "trainer.max_steps=100")  # 1,600 prompts, 8 completions each
    once = compute.store_saving(made_inputs(*words), hardware.KNOWN["h100"].peak)
    assert once.online_completions == once.stored_completions == 12_800
    again = compute.store_saving(made_inputs(*words, "dataset_prompts=400"), hardware.KNOWN["h100"].peak)
    assert (again.online_completions, again.stored_completions) == (12_800, 3_200)
    assert again.stored_seconds == pytest.approx(again.online_seconds / 4)
