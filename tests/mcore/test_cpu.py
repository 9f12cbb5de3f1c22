"""What the CPU patches promise, one test each. They run on a worker rank, where ``cpu.install()`` was called."""

from __future__ import annotations

import pytest


def _cuda_queries_of_mcore_are_answered_and_torch_is_torchs_own():
    import torch
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.transformer.utils import get_default_causal_mask

    assert p2p_communication.torch.cuda.current_device() == torch.device("cpu")
    p2p_communication.torch.cuda.synchronize()
    assert get_default_causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
    assert schedules.torch.Tensor is torch.Tensor  # everything else is torch's own
    assert schedules.torch.cuda.is_available is torch.cuda.is_available
    torch_is_as_it_was()


def torch_is_as_it_was():
    import torch

    assert {f.__module__ for f in (torch.cuda.current_device, torch.cuda.synchronize)} == {"torch.cuda"}
    assert torch.compile.__module__ == "torch"
    for name in ("cuda", "type"):
        assert type(getattr(torch.Tensor, name)).__name__ == "method_descriptor"
        assert name not in vars(torch.Tensor)
    for ask in (torch.cuda.current_device, torch.ones(1).cuda, lambda: torch.zeros(1, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            ask()
    assert torch.ones(1).type() == "torch.FloatTensor"


def _train_and_save(model, directory):
    from tests.checkpoint_runs import train_and_save

    train_and_save(model, directory, 1, 2, distributed_optimizer=True)
    torch_is_as_it_was()


def test_after_training_and_saving_torch_is_torchs_own(ranks, tiny_models, tmp_path):
    ranks.run(_train_and_save, tiny_models["qwen2_tied"], tmp_path / "checkpoints", world=2, pp=2)


def _random_stage(model):
    import torch

    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.bridge.weights import WeightMap
    from nemo_aapo.mcore.model import build_stage

    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    stage = build_stage(WeightMap(str(model), torch.float32), {**precision.machine_fields(torch.float32), **layout})
    assert "_is_in_embd_group" not in vars(stage)
    return stage.shared_embedding_or_output_weight().detach().numpy().copy()


def test_stages_that_share_an_embedding_begin_with_the_same_one(ranks, tiny_models):
    first, last = ranks.run(_random_stage, tiny_models["qwen2_tied"], world=2, pp=2)
    assert first.any()
    assert (first == last).all()


def _policies_are_gone(model):
    import gc
    import weakref

    from tests.checkpoint_runs import make_policy

    modules = [weakref.ref(make_policy(model, distributed_optimizer=True).module) for _ in range(2)]
    gc.collect()
    return [module() is None for module in modules]


def test_a_policy_that_nobody_needs_any_more_is_collected(ranks, tiny_models):
    assert ranks.run(_policies_are_gone, tiny_models["qwen2"]) == [[True, True]]


def _gradient_clipping():
    import torch
    from megatron.core.optimizer import clip_grads, optimizer

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=10.0, total_norm=1.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))  # never scaled up


def _rng_tracker():
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.add("test", 7)
    torch.manual_seed(1)
    outside = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("test"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), outside)  # the default stream did not notice
    with tracker.fork("test"):
        second = torch.rand(3)
    assert not torch.equal(first, second)  # the forked stream went on
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def _mcore_gives_nothing_to_a_compiler():
    import sys

    from megatron.core.jit import jit_fuser, noop_decorator

    assert jit_fuser is noop_decorator
    assert "torch._inductor.compile_fx" not in sys.modules


def _the_bridge_leaves_no_stand_ins_behind():
    import importlib
    import sys

    from nemo_aapo.mcore.bridge.loader import OPTIONAL_DEPENDENCIES, auto_bridge_class

    auto_bridge_class("Qwen2ForCausalLM")
    assert not [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
    assert "transformer_engine" in OPTIONAL_DEPENDENCIES


def _parameters_are_named_as_on_a_gpu_only_inside():
    import torch

    from nemo_aapo.mcore.cpu import patches as cpu

    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    other = torch.nn.Parameter(torch.zeros(1))
    with cpu.types_as_on_gpu(iter(parameters)):
        assert [p.type() for p in parameters] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
        assert other.type() == torch.zeros(1).type() == "torch.FloatTensor"
    assert [p.type() for p in parameters] == ["torch.FloatTensor", "torch.BFloat16Tensor"]


def _mcore_takes_torchs_adam_and_norms():
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    assert optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    large = torch.full((9_000_000,), 1e-3)  # mcore's own norm of it is 1.4e-3 too large
    norm = clip_grads.get_grad_norm_fp32([large, torch.tensor([4.0])], grad_stats_parallel_group=None)
    assert abs(norm / 5.0 - 1) < 1e-7


def _rotary_embedding():
    import types

    import torch
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils

    x = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    frequencies = torch.cat((angles, angles), -1)[:, None, None]
    turned = rope_utils._apply_rotary_pos_emb_bshd(x, frequencies)
    pairs = (
        torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones(5, 4), angles)[:, None, None]
    )
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))
    # a part of the head is turned, or neighbours instead of halves: by mcore's own
    assert torch.equal(rope_utils._apply_rotary_pos_emb_bshd(x, frequencies[..., :4])[..., 4:], x[..., 4:])
    neighbours = rope_utils._apply_rotary_pos_emb_bshd(x, frequencies, rotary_interleaved=True)
    assert not torch.allclose(neighbours, turned)
    # bf16 with the angles in fp32 too, as mcore's layers call it, rounded once: padded rows and packed ones
    said = {"apply_rope_fusion": False, "rotary_interleaved": False, "multi_latent_attention": False}
    config, group = types.SimpleNamespace(**said), parallel_state.get_context_parallel_group()
    rows, end_to_end = x.detach().bfloat16(), torch.tensor([0, 5], dtype=torch.int32)
    padded = rope_utils.apply_rotary_pos_emb(rows, frequencies, config, cp_group=group)
    assert torch.equal(padded, rope_utils._apply_rotary_pos_emb_bshd(rows.float(), frequencies).bfloat16())
    torch.testing.assert_close(padded.float(), turned, rtol=0.02, atol=0.02)
    packed = rope_utils.apply_rotary_pos_emb(rows[:, 0], frequencies, config, end_to_end, cp_group=group)
    assert torch.equal(packed, padded[:, 0])


def _weight_gradients():
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    x, weight = torch.randn(4, 2, 3), torch.nn.Parameter(torch.randn(5, 3))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(5, 3), False
    group = parallel_state.get_tensor_model_parallel_group()
    linear_with_grad_accumulation_and_async_allreduce(
        x, weight, None, gradient_accumulation_fusion=True, allreduce_dgrad=False, sequence_parallel=False,
        tp_group=group,
    ).sum().backward()  # fmt: skip
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 1.0 + x.sum((0, 1)).expand(5, 3))


def _tokens_are_sent_to_experts_without_a_stream():
    import torch
    from megatron.core.transformer.moe.moe_utils import router_gating_linear
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, sort_chunks_by_idxs

    made = MoEAlltoAllTokenDispatcher.__new__(MoEAlltoAllTokenDispatcher)
    made.input_splits, made.output_splits = torch.tensor([2, 3]), None
    counts = torch.tensor([1, 4])
    assert made._maybe_dtoh_and_synchronize("before_ep_alltoall", counts) is counts
    assert (made.input_splits, made.output_splits) == ([2, 3], None)

    tokens, sizes = torch.arange(6.0), torch.tensor([1, 2, 3])
    assert sort_chunks_by_idxs(tokens, sizes, torch.arange(3), tokens)[0] is tokens
    assert sort_chunks_by_idxs(tokens, sizes, torch.tensor([2, 0, 1]))[0].tolist() == [3, 4, 5, 0, 1, 2]

    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    scores = router_gating_linear(x, weight, None, torch.float32)
    torch.testing.assert_close(scores, x @ weight.t())
    scores.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 4))


@pytest.mark.parametrize(
    "promise",
    [
        _cuda_queries_of_mcore_are_answered_and_torch_is_torchs_own,
        _gradient_clipping,
        _rng_tracker,
        _rotary_embedding,
        _weight_gradients,
        _tokens_are_sent_to_experts_without_a_stream,
        _parameters_are_named_as_on_a_gpu_only_inside,
        _mcore_takes_torchs_adam_and_norms,
        _mcore_gives_nothing_to_a_compiler,
        _the_bridge_leaves_no_stand_ins_behind,
    ],
)
def test_cpu_patch(ranks, promise):
    ranks.run(promise)
