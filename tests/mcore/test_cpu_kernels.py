"""The local layers' kernels against the same mathematics written out for autograd, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemo_aapo.mcore.cpu.kernels import l2_norm, rms_norm, rotary, swiglu

pytestmark = pytest.mark.exact

SHAPES = [(7, 3, 16), (5, 2, 4, 6), (1, 1, 2)]


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def plain_rotary(x: torch.Tensor, frequencies: torch.Tensor, scale: float) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return (x * frequencies.cos() + torch.cat((-second, first), -1) * frequencies.sin()) * scale


def cases(generator: torch.Generator, x: torch.Tensor):
    """(kernel, what it must equal, its tensors that want gradients)."""
    width = x.shape[-1]
    weight = torch.randn(width, generator=generator, dtype=x.dtype).requires_grad_()
    angles = 6 * torch.randn(len(x), *[1] * (x.ndim - 2), width // 2, generator=generator, dtype=x.dtype)
    frequencies = torch.cat((angles, angles), -1)
    yield lambda: rms_norm(x, weight, 1e-3), lambda: F.rms_norm(x, (width,), weight, 1e-3), (x, weight)
    yield lambda: swiglu(x), lambda: plain_swiglu(x), (x,)
    for scale in (1.0, 1.3):  # of the same angles: what is kept with them must not be taken for the other
        yield lambda s=scale: rotary(x, frequencies, s), lambda s=scale: plain_rotary(x, frequencies, s), (x,)


@pytest.mark.parametrize("strided", [False, True], ids=["", "parts of larger tensors"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_autograds_own_chain(shape, strided):
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes):
        made = torch.randn(*sizes[:-1], 3 * sizes[-1], generator=generator, dtype=torch.float64)
        part = made[..., sizes[-1] : 2 * sizes[-1]]  # as mcore cuts keys out of the qkv product
        return part if strided else part.contiguous()

    x = random(*shape).requires_grad_()
    for kernel, plain, wanted in cases(generator, x):
        value, expected = kernel(), plain()
        grad = random(*value.shape)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        found, right = (torch.autograd.grad(y, wanted, grad) for y in (value, expected))
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_norm_of_thirty_million_entries_is_that_of_float64():
    """torch's own is off by 1.7e-3 there."""
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(30_000_001, generator=generator) * 1e-3
    tensors = [large, torch.full((3, 5), 0.25), torch.zeros(0), large[:1025].view(5, 205).t()]
    expected = math.sqrt(sum(float(part.double().square().sum()) for t in tensors for part in t.split(1 << 20)))
    assert float(l2_norm(tensors)) == pytest.approx(expected, rel=1e-7)
