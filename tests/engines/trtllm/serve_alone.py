"""A rollout server of TensorRT-LLM, the stand-in, in an environment without the learner's packages.

    python -m tests.engines.trtllm.serve_alone FILE KEY=VALUE ...

At its end it leaves the names of all packages that it has imported in FILE, as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

LEARNERS = ("megatron", "transformer_engine", "nemo", "lightning", "transformers")


class Absent(MetaPathFinder):
    """Packages that are not there."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in LEARNERS:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def packages() -> list[str]:
    """Top-level packages of the environment among what is imported."""
    tops = {name.partition(".")[0] for name in sys.modules} - {"tests", "nemo_aapo"}
    found = ((top, PathFinder.find_spec(top)) for top in tops if not top.startswith("_"))
    return sorted(top for top, spec in found if spec and spec.origin and "site-packages" in spec.origin)


def main(record: str, words: list[str]) -> int:
    sys.meta_path.insert(0, Absent())
    before = set(packages())  # the test's own
    from tests import fake_trtllm
    from tests.engines.trtllm.conftest import pretend_gpus

    monkeypatch = pytest.MonkeyPatch()
    fake_trtllm.install(monkeypatch)
    pretend_gpus(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    from nemo_aapo.cli.serve import main as serve

    code = serve(words)
    Path(record).write_text(json.dumps(sorted(set(packages()) - before)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
