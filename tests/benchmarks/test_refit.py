"""``benchmark.py refit``: the table sets each kind beside files of the same numbers."""

from __future__ import annotations

from benchmarks import refit
from benchmarks.refit import Row


def test_each_kind_is_compared_with_files_of_the_same_dtype():
    rows = [
        Row("files", "fp32", 20_000_000, 2.0, 2.5, 80_000_000),
        Row("collective", "fp32", 20_000_000, 0.4, 0.5, 160_000_000),
        Row("ipc", "fp32", 20_000_000, 1.0, 1.1, 80_000_000),
        Row("files", "bf16", 20_000_000, 1.5, 1.6, 40_000_000),
        Row("delta", "bf16", 20_000_000, 3.0, 3.1, 2_000_000),
    ]
    header, cells = refit.table(rows)
    assert [len(row) for row in cells] == [len(header)] * 5
    shares = [[row[0], row[header.index("to files")], row[-1]] for row in cells]
    assert shares == [
        ["files", "1.00", "1.000"],
        ["collective", "0.20", "2.000"],
        ["ipc", "0.50", "1.000"],
        ["files", "1.00", "1.000"],
        ["delta", "2.00", "0.050"],
    ]
    assert [(row.kind, row.dtype) for row in rows] == list(refit.KINDS)
