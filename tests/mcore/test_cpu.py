"""What the CPU patches promise, one test each. They run on a worker rank, where ``cpu.install()`` was called."""

from __future__ import annotations

import pytest


def _device_queries():
    import torch

    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor


def _cuda_literals():
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
    assert schedules.torch.Tensor is torch.Tensor  # everything else is torch's own
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")  # and torch itself is as it was


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


def _other_versions_are_refused():
    import megatron.core

    from nemo_aapo.mcore.cpu import patches as cpu

    version, megatron.core.__version__ = megatron.core.__version__, "0.17.0"
    try:
        with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.0 .* 0\.16"):
            cpu._check_version()
    finally:
        megatron.core.__version__ = version


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

    tensor = torch.zeros(1)
    with cpu.types_as_on_gpu():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"


def _mcore_takes_torchs_adam_and_norms():
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    assert optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    assert clip_grads.get_grad_norm_fp32([torch.tensor([3.0, 4.0])], grad_stats_parallel_group=None) == 5.0


def _rotary_embedding():
    import torch
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


@pytest.mark.parametrize(
    "promise",
    [
        _device_queries,
        _cuda_literals,
        _gradient_clipping,
        _rng_tracker,
        _rotary_embedding,
        _weight_gradients,
        _parameters_are_named_as_on_a_gpu_only_inside,
        _mcore_takes_torchs_adam_and_norms,
        _other_versions_are_refused,
        _the_bridge_leaves_no_stand_ins_behind,
    ],
)
def test_cpu_patch(ranks, promise):
    ranks.run(promise)
