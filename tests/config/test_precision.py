"""What a precision asks of machine, model and layout is said before anything is built."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.config import PRECISIONS, ModelShape, derive, pad_multiple, with_machine_defaults
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import Machine, decide, refusal
from tests.tiny_models import make_config

QWEN_1_5B = ModelShape("Qwen2ForCausalLM", 28, 1536, 8960, 12, 2, 128, 151_936, True, 32_768)
H200 = Machine("NVIDIA H200", (9, 0), (13, 0), transformer_engine=True)
A100 = Machine("NVIDIA A100", (8, 0), (12, 8), transformer_engine=True)
L40 = Machine("NVIDIA L40", (8, 9), (12, 8), transformer_engine=True)
B200 = Machine("NVIDIA B200", (10, 0), (13, 0), transformer_engine=True)
V100 = Machine("Tesla V100", (7, 0), (12, 8), transformer_engine=True)
CPU = Machine(None)
FP8 = ("fp8_tensorwise", "fp8_blockwise", "fp8_delayed")


def config(**changes):
    return make_config("/model", max_tokens_per_microbatch=2048, **changes)


def decided(machine: Machine, **changes):
    return with_machine_defaults(config(**changes), on_gpu=machine.gpu is not None)


def test_the_machine_decides_what_is_left_to_it_and_nothing_else():
    on_gpu, on_cpu = (decided(machine) for machine in (H200, CPU))
    assert (on_gpu.precision.name, on_cpu.precision.name) == ("bf16", "fp32")
    for machine, found in ((H200, on_gpu), (CPU, on_cpu)):
        gpu = machine is H200
        assert found.model.sequence_packing
        assert found.model.share_prompts is not gpu
        assert found.model.optim.use_distributed_optimizer is gpu
        assert refusal(found, machine) is None
        assert with_machine_defaults(found, on_gpu=not gpu) == found  # decided once
    asked = decided(
        H200,
        precision__name="fp32",
        model__sequence_packing=False,
        model__optim__use_distributed_optimizer=False,
    )
    assert asked.precision.name == "fp32"
    assert not asked.model.sequence_packing
    assert not decided(CPU, model__sequence_packing=False).model.share_prompts
    assert not asked.model.optim.use_distributed_optimizer


@pytest.mark.parametrize(
    ("machine", "able"),
    [
        (CPU, {"fp32"}),
        (V100, {"fp32"}),
        (A100, {"fp32", "bf16"}),
        (L40, {"fp32", "bf16", "fp8_tensorwise", "fp8_delayed"}),
        (H200, set(PRECISIONS)),
        (dataclasses.replace(H200, cuda=(12, 8)), set(PRECISIONS) - {"fp8_blockwise"}),
        (B200, set(PRECISIONS) - {"fp8_blockwise"}),
        (dataclasses.replace(H200, transformer_engine=False), set()),
    ],
)
def test_a_machine_that_cannot_do_a_precision_refuses_it_by_name_and_says_what_it_can(machine, able):
    for name in PRECISIONS:
        problem = refusal(decided(machine, precision__name=name), machine)
        assert (problem is None) == (name in able), (name, problem)
        if problem:
            assert name in problem
        if problem and machine.gpu and machine.transformer_engine:
            assert machine.gpu in problem or "CUDA" in problem
            best = next(c for c in ("fp8_tensorwise", "bf16", "fp32") if c in able)
            assert f"precision={best}" in problem


def test_memory_that_is_not_there_cannot_be_moved():
    for change in ({"model__optim__cpu_offload_fraction": 0.5}, {"rollout__offload_learner": True}):
        assert "no GPU" in refusal(decided(CPU, **change), CPU)
        assert refusal(decided(H200, **change), H200) is None
    fp32 = decided(H200, precision__name="fp32", rollout__offload_learner=True)
    assert "precision=bf16" in refusal(fp32, H200)


def test_a_sequence_that_is_cut_lies_in_a_row_of_sequences():
    apart = {"model__share_prompts": False}
    assert decided(CPU, **apart).model.sequence_packing is False
    assert decided(CPU, **apart, model__context_parallel_size=2).model.sequence_packing is True


def test_transformer_engine_cuts_no_sequence_of_fp32():
    cut = {"model__context_parallel_size": 2}
    assert refusal(decided(H200, **cut), H200) is None
    assert "use precision=bf16" in refusal(decided(H200, **cut, precision__name="fp32"), H200)
    assert refusal(decided(CPU, **cut), CPU) is None


def test_prompts_are_shared_on_a_cpu_and_where_asked_for_on_a_gpu_in_bf16():
    asked = {"model__share_prompts": True}
    for machine in (CPU, H200):
        assert refusal(decided(machine, **asked), machine) is None
    for more in ({"precision__name": "fp32"}, {"model__context_parallel_size": 2}):
        assert "precision=bf16 and model.context_parallel_size=1" in refusal(decided(H200, **asked, **more), H200)


def test_what_the_machine_decides_is_checked_with_the_rest():
    """The distributed optimizer that overlapping needs is a GPU's default, and not a CPU's."""
    asked = config(model__optim__overlap_grad_reduce=True, model__optim__overlap_param_gather=True)
    with pytest.raises(
        ConfigError, match=r"overlap_param_gather=True needs model\.optim\.use_distributed_optimizer=true"
    ):
        decide(asked, CPU)
    assert decide(asked, H200).model.optim.use_distributed_optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision__num_layers_at_start_in_bf16": 1}, "no effect with precision=auto"),
        ({"precision__name": "bf16", "precision__num_layers_at_end_in_bf16": 1}, "no effect with precision=bf16"),
        ({"precision__name": "fp8_delayed", "precision__num_layers_at_start_in_bf16": 1}, "use precision=fp8_tensorw"),
        ({"model__recompute_modules": ["layernorm"]}, "known values are core_attn, mlp, moe"),
        ({"precision__name": "fp9"}, "known values are auto, fp32, bf16"),
        ({"model__context_parallel_size": 2, "model__sequence_packing": False}, "sequence_packing=false pads each"),
        ({"model__recompute_granularity": "selective", "model__recompute_modules": []}, "is empty"),
        ({"model__share_prompts": True, "model__sequence_packing": False}, "sequence_packing=true"),
        ({"model__optim__cpu_offload_fraction": 1.5}, r"\[0, 1\]"),
        (
            {"model__optim__use_distributed_optimizer": False, "model__optim__cpu_offload_fraction": 0.5},
            "use_distributed_optimizer=true",
        ),
        ({"model__optim__overlap_param_gather": True}, "overlap_grad_reduce=true"),
        (
            {
                "model__optim__use_distributed_optimizer": False,
                "model__optim__overlap_grad_reduce": True,
                "model__optim__overlap_param_gather": True,
            },
            "use_distributed_optimizer=true",
        ),
        ({"rollout__engine": "remote", "rollout__offload_learner": True}, "which generates elsewhere"),
        ({"rollout__offload_learner": True, "model__optim__cpu_offload_fraction": 0.5}, "one of the two"),
    ],
)
def test_combinations_that_no_machine_can_do_are_refused_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", FP8)
def test_fp8_wants_aligned_layers_on_every_rank_and_says_which_is_not(name):
    derive(config(precision__name=name, model__path="/m"), QWEN_1_5B, 1)
    odd = dataclasses.replace(QWEN_1_5B, ffn_hidden_size=8968)
    with pytest.raises(ConfigError, match=rf"precision={name}.*feed-forward units of a rank is 8968"):
        derive(config(precision__name=name), odd, 1)
    derive(config(precision__name="bf16"), odd, 1)
    two_ways = dataclasses.replace(QWEN_1_5B, ffn_hidden_size=128 * 35)
    cut = config(precision__name=name, model__tensor_model_parallel_size=2, trainer__devices=2)
    if name == "fp8_blockwise":
        with pytest.raises(ConfigError, match=r"a rank is 2240 at model.tensor_model_parallel_size=2.*fp8_tensorwise"):
            derive(cut, two_ways, 2)
    else:
        derive(cut, two_ways, 2)


def test_bf16_layers_of_an_fp8_model_lie_within_a_pipeline_stage():
    asked = config(precision__name="fp8_tensorwise", precision__num_layers_at_end_in_bf16=28)
    derive(asked, QWEN_1_5B, 1)
    cut = config(
        precision__name="fp8_tensorwise",
        precision__num_layers_at_end_in_bf16=15,
        model__pipeline_model_parallel_size=2,
        trainer__devices=2,
    )
    with pytest.raises(ConfigError, match="a pipeline stage has 14 layers"):
        derive(cut, QWEN_1_5B, 2)


@pytest.mark.parametrize(
    ("name", "tp", "sp", "expected"),
    [
        ("auto", 1, False, 1),
        ("bf16", 4, False, 1),
        ("bf16", 4, True, 4),
        ("fp8_tensorwise", 1, False, 16),
        ("fp8_delayed", 2, True, 32),
        ("fp8_blockwise", 4, False, 128),
        ("fp8_blockwise", 4, True, 512),
    ],
)
def test_one_number_says_what_token_counts_are_padded_to(name, tp, sp, expected):
    found = config(precision__name=name, model__tensor_model_parallel_size=tp, model__sequence_parallel=sp)
    assert pad_multiple(found) == expected


def test_a_budget_that_padding_overflows_is_refused_before_the_run():
    tight = make_config("/m", precision__name="fp8_blockwise", max_tokens_per_microbatch=100)
    with pytest.raises(ConfigError, match=r"100 can't hold one sequence of 48 tokens padded to a multiple of 128"):
        derive(tight, QWEN_1_5B, 1)
