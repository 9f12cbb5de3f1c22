"""Products with packed weights are those with the weights."""

from __future__ import annotations

import pytest
import torch

from nemo_aapo.engines.megatron import matmul
from nemo_aapo.engines.megatron.matmul import (
    MAX_BLOCK_COLUMNS,
    SMALL_WEIGHT,
    Adapted,
    add_linear_,
    linear,
    pack_weight,
)
from nemo_aapo.utils import machine

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
@pytest.mark.parametrize("onednn", [False, True])
def test_a_weight_multiplies_the_same_however_it_is_packed(outputs, inputs, blocks, rows, onednn, monkeypatch):
    monkeypatch.setattr(matmul, "packs_by_onednn", lambda: onednn)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, rows))
    bias, y = torch.randn(outputs, generator=generator), torch.randn(rows, outputs, generator=generator)
    copy = pack_weight(weight)
    if onednn:
        assert copy.is_mkldnn == (weight.numel() >= SMALL_WEIGHT)
        assert copy.shape == weight.shape
    elif blocks:
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


@pytest.mark.parametrize(("facts", "maker"), [("vendor_id\t: AuthenticAMD\n", "AuthenticAMD"), ("", None)])
def test_the_processors_maker_decides_who_multiplies_packed_weights(facts, maker, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{facts}model name\t: EPYC\n")
    monkeypatch.setattr(machine, "_CPU_FACTS", tmp_path / "cpuinfo")
    for cached in (machine.processor_maker, matmul.packs_by_onednn):
        cached.cache_clear()
    try:
        assert machine.processor_maker() == maker
        assert matmul.packs_by_onednn() == (maker is not None)
        if not torch.cuda.is_available():
            capability = torch.backends.cpu.get_cpu_capability()
            assert machine.instruction_set() == (f"{capability}, {maker}" if maker else capability)
    finally:
        for cached in (machine.processor_maker, matmul.packs_by_onednn):
            cached.cache_clear()


def test_an_adapter_beside_its_weight_is_the_merged_weight_and_keeps_an_update_that_bf16_would_swallow():
    generator = torch.Generator().manual_seed(0)
    shapes = (48, 64), (4, 64), (48, 4), (7, 64), (7, 48)
    weight, a, b, x, y = (torch.randn(shape, generator=generator) for shape in shapes)
    merged = weight + 0.5 * b @ a
    adapted = Adapted(weight, a, b, 0.5)
    torch.testing.assert_close(linear(x, adapted, y[0]), x @ merged.t() + y[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(add_linear_(y.clone(), x, adapted), x @ merged.t() + y, atol=1e-4, rtol=1e-4)

    weight, a, b = weight.bfloat16(), a.bfloat16(), (1e-3 * b).bfloat16()
    assert ((weight + 0.5 * b @ a) == weight).float().mean() > 0.5  # of the merged weight's entries
    zero = x.new_zeros(7, 64).bfloat16()
    zero[:, 0] = 1.0  # reads one column, without a sum that rounds
    update = linear(zero, Adapted(torch.zeros_like(weight), a, b, 0.5))
    torch.testing.assert_close(
        update.float(), 0.5 * (zero.float() @ a.float().t()) @ b.float().t(), atol=1e-6, rtol=1e-2
    )
