"""The examples of docs/guide/extending.md run as they stand; what README and pages name is there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_aapo.models.directory import ARCHITECTURES

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
PAGES = [ROOT / path for path in TRACKED if path.endswith(".md")]


def examples() -> dict[str, str]:
    text = (ROOT / "docs" / "guide" / "extending.md").read_text()
    return dict(re.findall(r"<!-- runs: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a barely trained base model where the quickstart would have put a good one."""
    from examples.quickstart.base_model import Recipe, make_base_model

    folder = tmp_path_factory.mktemp("docs")
    recipe = Recipe(clean_steps=30, noisy_steps=0)
    make_base_model(folder / "results" / "quickstart_base", recipe, force=False, log=print)
    assert asdict(recipe)["seed"] == 0
    return folder


@pytest.mark.slow
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


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readmes_map_of_the_code_names_files_and_what_is_in_them():
    text = (ROOT / "README.md").read_text().split("## Read the code in this order", 1)[1].split("## ", 1)[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 8
    for question, files, names in rows:
        paths = [ROOT / name for name in re.findall(r"`([\w/.]+)`", files)]
        assert all(path.exists() for path in paths), question
        defined = {name for path in paths if path.suffix == ".py" for name in definitions(path)}
        wanted = re.findall(r"`([\w.]+)`", names)
        assert wanted, question
        assert set(wanted) <= defined, f"{question}: {sorted(set(wanted) - defined)} is not in {files}"


def definitions(path: Path) -> set[str]:
    """Functions, classes and constants of a module; methods by their own name and as ``Class.method``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_each_folder_of_the_package_says_in_a_sentence_what_it_holds():
    for path in sorted((ROOT / "nemo_aapo").rglob("__init__.py")):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert first[:1].isupper(), f"{path}: {first!r}"
        assert first.endswith("."), f"{path}: {first!r}"


def test_each_promise_names_tests_that_are_there():
    text = (ROOT / "docs" / "design" / "guarantees.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    for row in rows:
        tests = re.findall(r"`([\w/.*]+\.py)`", row.rsplit("|", 2)[1])
        assert tests, f"no test named: {row}"
        assert not [name for name in tests if not (ROOT / name).is_file()], row


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a link to one of the page's headings ends in, as GitHub has it."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_every_page_and_picture_that_code_and_settings_name_is_there():
    for path in TRACKED:
        if path.endswith((".py", ".sh", ".yaml", ".toml", "Dockerfile", ".md")) and path != "CHANGELOG.md":
            text = (ROOT / path).read_text()
            missing = [name for name in re.findall(r"docs/[\w/]+\.(?:md|svg|png)", text) if not (ROOT / name).is_file()]
            assert not missing, f"{path} names {missing}"


def test_modules_that_pages_name_are_there():
    elsewhere = {"module/base.py"}  # TransformerEngine's
    for page in PAGES:
        for name in set(re.findall(r"`([\w]+/[\w/]+\.py)`", page.read_text())) - elsewhere:
            assert (ROOT / name).is_file() or (ROOT / "nemo_aapo" / name).is_file(), f"{page.relative_to(ROOT)}: {name}"


def test_classes_that_docstrings_name_by_their_module_are_there():
    package, found = ROOT / "nemo_aapo", 0
    for path in (ROOT / path for path in TRACKED if path.startswith("nemo_aapo/") and path.endswith(".py")):
        for module, name in re.findall(r"``(?:nemo_aapo\.)?((?:[a-z]\w*\.)+)([A-Z]\w*)``", path.read_text()):
            place = package.joinpath(*module.split(".")[:-1])
            if (package / module.split(".")[0]).is_dir():  # and no other library's
                found += 1
                file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                there = file.is_file() and re.search(rf"^(class )?{name}\b", file.read_text(), re.MULTILINE)
                assert there, f"{path.relative_to(ROOT)}: {module}{name}"
    assert found > 10


def test_tests_that_pages_name_are_there():
    for page in PAGES:
        for written in re.findall(r"tests/[\w/{},.*]*[\w}/*]", page.read_text()):
            missing = [path for path in alternatives(written) if not [*ROOT.glob(path)]]
            assert not missing, f"{page.relative_to(ROOT)}: {written} names {missing}"


def alternatives(path: str) -> list[str]:
    """The paths that one with braces stands for, as in a shell."""
    before, brace, rest = path.partition("{")
    if not brace:
        return [path]
    words, _, after = rest.partition("}")
    return [path for word in words.split(",") for path in alternatives(before + word + after)]


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent.parent == ROOT / "docs"}
    assert pages == set(re.findall(r"^\| \[[^]]+\]\(([\w/]+\.md)\)", index, re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "docs/guide/training.md", "docs/guide/conversion.md"])
def test_every_family_that_trains_is_named_where_models_are(page):
    families = {name.removesuffix("ForCausalLM").lower().removeprefix("qwen3moe") for name in ARCHITECTURES} - {""}
    text = (ROOT / page).read_text().lower().replace(" ", "")
    assert [family for family in families if family not in text] == []
