"""Libraries of .venv-peers, run in a process of their own with the Python and torch of .venv."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"


def needs(package: str) -> pytest.MarkDecorator:
    """Skips tests where the package is not there in the version that requirements/peers.txt names."""
    pins = (ROOT / "requirements" / "peers.txt").read_text()
    version = re.search(rf"^{re.escape(package)}==(.+)$", pins, re.MULTILINE)[1]
    folder = PEERS / f"{package.replace('-', '_')}-{version}.dist-info"
    reason = f".venv-peers has no {package} {version}: run scripts/peers.sh, which says what is in the way"
    return pytest.mark.skipif(not folder.is_dir(), reason=reason)


def run_peer(module: str, *words: object, home: Path) -> str:
    """``tests.peers.MODULE`` with these words; what it wrote to its standard output.

    Args:
        home: for what the Hugging Face libraries keep.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.peers.{module}", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(PEERS), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
