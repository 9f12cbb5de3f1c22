"""A step on a sequence that is cut over two ranks holds about half the memory on each, and computes the same."""

from __future__ import annotations

import pytest

from benchmarks import context
from benchmarks.workload import Workload, make_input

TOKENS = 512


@pytest.mark.parametrize(("heads", "most"), [(2, 0.6), (1, 0.75)])
def test_memory_falls_with_the_part_of_a_sequence_that_a_rank_has(ranks, tmp_path, heads, most):
    """Two heads are exchanged; of a single one every rank holds the keys and values of all tokens."""
    make_input(Workload(layers=1, key_value_heads=heads, positions=TOKENS), tmp_path)
    [whole], cut = (ranks.run(context.step, tmp_path, heads, size, TOKENS, world=size, cp=size) for size in (1, 2))
    for row in cut:
        assert row.step_bytes < most * whole.step_bytes
        assert row.loss == pytest.approx(whole.loss, rel=1e-6)
        assert 2 * row.row_tokens == whole.row_tokens == TOKENS
    _, cells = context.table([whole, cut[0]])
    assert cells[0][-1] == "1.00"
