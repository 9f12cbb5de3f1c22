"""Products with packed weights are those with the weights."""

from __future__ import annotations

import pytest
import torch

from nemo_aapo.engines.megatron.matmul import MAX_BLOCK_COLUMNS, SMALL_WEIGHT, add_linear_, linear, pack_weight

pytestmark = pytest.mark.exact


@pytest.mark.parametrize(
    ("outputs", "inputs", "blocks"),
    [
        (48, 16, None),  # small
        (256, 512, 1),
        (1024, 512, 4),
        (1152, 896, 6),  # blocks of 192
        (1187 * 128, 8, 1187),
        (1187, 512, None),  # a prime
        (2 * 1187, 512, None),  # blocks would be two numbers wide
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_weight_multiplies_the_same_however_it_is_pack_weight(outputs, inputs, blocks, rows):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, rows))
    bias, y = torch.randn(outputs, generator=generator), torch.randn(rows, outputs, generator=generator)
    copy = pack_weight(weight)
    if blocks:
        assert weight.numel() >= SMALL_WEIGHT
        assert copy.shape == (blocks, inputs, outputs // blocks)
        assert copy.shape[-1] <= MAX_BLOCK_COLUMNS
        assert copy.untyped_storage().nbytes() == weight.untyped_storage().nbytes()
    else:
        assert copy is weight
    expected = x.double() @ weight.double().t()
    close = {"atol": 1e-5 * inputs**0.5, "rtol": 1e-4}
    for own in (weight, copy):
        torch.testing.assert_close(linear(x, own).double(), expected, **close)
        torch.testing.assert_close(linear(x, own, bias).double(), expected + bias, **close)
        total = y.clone()
        assert add_linear_(total, x, own) is total
        torch.testing.assert_close(total.double(), expected + y, **close)
