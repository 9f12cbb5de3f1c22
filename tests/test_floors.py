"""Imports point down the floors of the house, and what a login node runs imports nothing heavy before it must."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts import SCRIPTS, exit_code_and_heavy_imports

PACKAGE = SCRIPTS.parent / "nemo_aapo"
FLOORS = (
    {"algorithms", "config", "launch", "types", "metrics", "files", "errors", "seeds"},
    {"rollout", "policy", "rewards", "data", "checkpoint", "experiment"},
    {"evaluation"},
    {"trainer"},
    {"assemble", "assemble_reference"},
    {"reference_job", "evaluation_job", "study", "doctor", "benchmarks"},
)
"""From the ground up; what is not named serves several floors."""
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and first part below the package of everything that a module imports of it, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nemo_aapo":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_aapo."):
            yield node.lineno, node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("nemo_aapo."))


def test_no_module_imports_what_stands_above_it():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        height = HEIGHT.get(part, len(FLOORS))
        upward += [f"{path}:{line} imports {name}" for line, name in imports(path) if HEIGHT.get(name, 0) > height]
    assert not upward


def test_every_floor_is_there():
    there = {path.stem for path in PACKAGE.iterdir()}
    assert set(HEIGHT) <= there


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "stress"))
def test_help_imports_nothing_heavy(script):
    said = exit_code_and_heavy_imports(script, ["--help"])
    assert said.splitlines()[-1] == "0 []", said
