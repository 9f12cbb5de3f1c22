"""scripts/benchmark.py peers from end to end, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks.peers import compare
from benchmarks.peers.plan import COMPARISONS, QUICK
from nemo_aapo.errors import RunError


@pytest.mark.timeout(700)
def test_training_steps_beside_trls_on_the_same_checkpoint(tmp_path):
    try:
        version = compare.trl_version()
    except RunError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(compare.ROOT / "scripts" / "benchmark.py"), "peers", "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(compare.ROOT), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "results" / "peers_quick" / "figures.json").read_text())
    assert figures["trl"] == version
    assert [cell["contestant"] for cell in figures["cells"]] == [
        name for c in QUICK.comparisons for name in (c.ours, c.theirs)
    ]
    for cell in figures["cells"]:
        assert len(cell["steps"]) == QUICK.repeats
        for step in cell["steps"]:
            assert step["cpu"] > 0
            assert QUICK.sequences <= step["tokens"] <= QUICK.sequences * QUICK.new_tokens
            assert step["longest_over_mean"] > 1.0
            assert all(seconds >= 0 for seconds in step["phases"].values())
            assert 0 < sum(step["phases"].values()) < 1.01 * step["wall"]
            draws_twice = cell["contestant"] in ("trl_twice", "ours_fresh")
            assert (step["reference_tokens"] >= QUICK.sequences) == draws_twice
    (agreement,) = figures["agreements"]
    assert agreement["gradient_norm"] == pytest.approx(agreement["trl_gradient_norm"], rel=1e-4)
    assert abs(agreement["loss"]) > 1e-3  # lengths differ, so the loss says something
    tables = (tmp_path / "results" / "peers_quick" / "tables.md").read_text()
    assert " met" not in tables
    assert " missed" not in tables  # targets are for other sizes
    for comparison in COMPARISONS:
        assert (f"| {comparison.arm} " in tables) == (comparison.lengths == "variable")
    with Image.open(tmp_path / "results" / "peers_quick" / "ratios.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 10  # something is drawn
