"""``scripts/benchmark.py WHAT --quick`` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.scripts import SCRIPTS


def quick(what: str, folder: Path, limit_s: float = 280) -> tuple[str, dict[str, Any]]:
    """What it prints, and its figures. folder: gets their file."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPTS / "benchmark.py", what, "--quick", "--json", folder / "figures.json"],
        cwd=SCRIPTS.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads((folder / "figures.json").read_text())
