"""The benchmark of experts measures what a training pass runs, on a tiny layer."""

from __future__ import annotations

from pathlib import Path


def _compare(folder):
    from benchmarks.experts import QUICK, compare, report

    rows = compare(QUICK, Path(folder))
    return rows, report(rows)


def test_experts_are_measured_beside_mcores_and_beside_a_dense_layer(ranks, tmp_path):
    [(rows, table)] = ranks.run(_compare, tmp_path / "model")
    assert [row.tokens for row in rows] == [16]
    assert all(figure.low > 0 for row in rows for figure in (row.grouped, row.products, row.one_by_one))
    assert len(table.splitlines()) == 3
