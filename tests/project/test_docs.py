"""The examples of docs/guide/extending.md run as they stand; what README and docs name is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def examples() -> dict[str, str]:
    text = (ROOT / "docs" / "guide" / "extending.md").read_text()
    return dict(re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a barely trained base model where the quickstart would have put a good one."""
    from examples.quickstart.base_model import Recipe, make_base_model

    folder = tmp_path_factory.mktemp("docs")
    recipe = Recipe(clean_steps=30, noisy_steps=0)
    make_base_model(folder / "results" / "quickstart_base", recipe, force=False, say=print)
    assert asdict(recipe)["seed"] == 0
    return folder


@pytest.mark.parametrize("name", ["custom_reward", "custom_data"])
def test_an_example_of_the_docs_runs_and_is_short(workplace, name):
    code = examples()[name]
    assert len(code.splitlines()) <= 30
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {"custom_reward": "short", "custom_data": "doubles"}
    lines = (workplace / "results" / runs[name] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2]


def test_the_readmes_tree_names_what_is_there_and_all_of_it():
    text = (ROOT / "README.md").read_text()
    tree = text.split("## The tree", 1)[1]
    named = set(re.findall(r"^\s*([\w./-]+\.(?:py|sh|yaml|md|svg|png))\s", tree, re.MULTILINE))
    there = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {
        Path(path).name
        for path in there
        if path.startswith(("nemo_aapo/", "scripts/", "conf/", "docs/")) and Path(path).name != "__init__.py"
    }
    assert {Path(name).name for name in named} >= wanted, sorted(wanted - {Path(name).name for name in named})


def test_each_promise_names_tests_that_are_there():
    text = (ROOT / "docs" / "design" / "guarantees.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    for row in rows:
        tests = re.findall(r"`([\w/.*]+\.py)`", row.rsplit("|", 2)[1])
        assert tests, f"no test named: {row}"
        assert not [name for name in tests if not (ROOT / name).is_file()], row


def test_links_between_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        assert not [link for link in links if not (page.parent / link).exists()], page.name
