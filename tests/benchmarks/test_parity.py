"""``benchmark.py parity``: FP8's products are emulated as they are said to be, and the figures tell what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.fp8 import E4M3_MAX, RECIPES, Fp8Products, quantize
from tests.benchmarks.quick import quick

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "results" / name for name in ("gpu.md", "notebook.md")]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exponent", [-9, 0, 5])
def test_what_lies_on_the_grid_of_e4m3_stays_as_it_is(exponent):
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].view(2, 127) * 2.0**exponent
    assert torch.equal(quantize(grid, None), grid)
    assert torch.equal(quantize(grid.bfloat16(), (1, 128)), grid.bfloat16())


@pytest.mark.parametrize("block", [None, (1, 128), (128, 128)])
def test_a_number_moves_by_a_sixteenth_of_itself_at_most_or_by_half_of_the_smallest_step(block):
    x = numbers(130, 300)
    moved = (quantize(x, block) - x).abs()
    assert moved.max() > 0
    # the smallest step is 2**-9, with the block's greatest number at 448
    assert (moved <= torch.maximum(x.abs() / 16, x.abs().max() / E4M3_MAX / 2**10) * (1 + 1e-6)).all()


def test_a_block_has_a_scale_of_its_own_and_a_tensor_one():
    x = numbers(256, 256)
    louder = x.clone()
    louder[:128, 128:] *= 1e7
    quiet = torch.ones(256, 256, dtype=torch.bool)
    quiet[:128, 128:] = False
    for block in RECIPES["fp8_blockwise"]:
        assert torch.equal(quantize(x, block)[quiet], quantize(louder, block)[quiet])
    for block in RECIPES["fp8_tensorwise"]:
        assert not quantize(louder, block)[quiet].any()  # too small beside the others


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_projections_of_the_module_multiply_in_fp8(recipe):
    module = torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(8, 16), "head": torch.nn.Linear(16, 8, bias=False)})
    (weight, bias), x = module["linear_fc1"].parameters(), numbers(4, 8)
    of_inputs, of_weights = RECIPES[recipe]
    expected = quantize(x, of_inputs) @ quantize(weight.detach(), of_weights).t()
    products = Fp8Products(module, recipe)
    with torch.inference_mode(), products:
        hidden = module["linear_fc1"](x)
        added = torch.zeros(4, 16).addmm_(x, weight.t())
        out, expected_out = module["head"](hidden), hidden @ module["head"].weight.t()
    torch.testing.assert_close(hidden, expected + bias)
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(out, expected_out)
    with products:  # with autograd on, another operation of torch computes it
        torch.testing.assert_close(module["linear_fc1"](x), expected + bias)
    with pytest.raises(RuntimeError, match="0 of 1 weights"), products:
        x @ x.t()


def _compared(folder):
    from benchmarks.parity import QUICK, fp8, lora

    folder.mkdir()
    return fp8(QUICK, folder), lora(QUICK, folder), fp8(QUICK, folder)


def test_fp8_moves_the_learner_away_and_an_engine_in_the_same_fp8_follows_block_by_block(ranks, tmp_path):
    [(rows, adapted, again)] = ranks.run(_compared, tmp_path / "models")
    assert rows == again
    found = {(row.learner, row.engine): row for row in rows}
    plain = found["bf16", "bf16"].parity
    for recipe in RECIPES:
        moved = found[recipe, "bf16"].parity
        assert moved.mult_prob_error - 1 > 2 * (plain.mult_prob_error - 1) > 0
        assert moved.gen_kl > 4 * plain.gen_kl > 0
    assert found["fp8_blockwise", "fp8_blockwise"].falls_by > 0.1
    [row] = adapted
    assert row.kept == pytest.approx(1.0, abs=0.01)
    assert row.kept_in_fp32 == pytest.approx(1.0, abs=0.01)
    for parity in (row.apart, row.merged):  # what the adapters do is seen, wherever they are applied
        assert 0 < parity.mult_prob_error - 1 < row.effect / 3


@pytest.mark.slow
def test_the_command_prints_both_tables_and_leaves_the_pages_alone_if_it_is_to_be_quick(tmp_path):
    before = [page.read_text() for page in PAGES]
    printed, figures = quick("parity", tmp_path)
    of_fp8, of_lora = printed.strip().split("\n\n")
    assert len(of_fp8.splitlines()) - 2 == len(figures["fp8"]) == 5
    assert len(of_lora.splitlines()) - 2 == len(figures["lora"]) == 1
    assert f"{figures['lora'][0]['merged']['mult_prob_error']:.5f}" in of_lora
    assert [page.read_text() for page in PAGES] == before
