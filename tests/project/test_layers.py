"""Imports point down the layers of the house, and what a login node runs imports nothing heavy before it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_aapo
from tests.scripts import SCRIPTS, exit_code_and_heavy_imports

ROOT = SCRIPTS.parent
PACKAGE = ROOT / "nemo_aapo"
OURS = {"nemo_aapo", "tests", "benchmarks", "examples", "scripts"}
LAYERS = (
    {"errors", "types", "seeds", "lines"},
    {"utils"},
    {"config"},
    {"text"},
    {"reference_store"},
    {"run"},
    {"distributed"},
    {"trace"},
    {"algorithms", "models", "data"},
    {"rewards"},
    {"launch"},
    {"report"},
    {"planning"},
    {"mcore"},
    {"checkpoint"},
    {"learner"},
    {"engines"},
    {"rollout"},
    {"conversion"},
    {"evaluation"},
    {"prepare"},
    {"training"},
    {"jobs"},
    {"doctor"},
    {"cli"},
)
"""From the ground up. Parts of one layer do not know each other."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MOST_FILES = 12
IMPORTING = ("import_module", "__import__", "find_spec")
"""Functions that import, or look for, the module that they are given the name of."""
MEGATRON_ROOMS = {"mcore", "checkpoint"}
"""Parts that may import megatron-core and Megatron-Bridge."""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and first part below the package of everything that a module imports of it, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nemo_aapo":
            yield from ((node.lineno, nemo_aapo._EXPORTS.get(a.name, a.name).split(".")[0]) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_aapo."):
            yield node.lineno, node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("nemo_aapo."))


def parts() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_every_part_of_the_package_has_its_layer():
    assert parts() - {"__init__"} == set(HEIGHT)


def test_no_module_imports_what_stands_above_or_beside_its_layer():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for line, name in imports(path):
            if name != part and HEIGHT[name] >= HEIGHT[part]:
                upward.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not upward


@pytest.mark.slow
def test_each_layer_is_imported_without_any_above_it():
    """What runs when a layer's modules are imported, from the ground up, in one new process."""
    code = f"""
import importlib, sys
layers = {modules_of_layers()!r}
for layer, names in layers:
    for name in names:
        importlib.import_module(name)
    above = {{part for other, modules in layers if other > layer for part in modules}}
    assert not above & sys.modules.keys(), (layer, sorted(above & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def modules_of_layers() -> list[tuple[int, list[str]]]:
    """Each layer's modules, but for those that need a GPU's packages at once."""
    found: dict[int, list[str]] = {height: [] for height in HEIGHT.values()}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if names[1] in HEIGHT and not names[-1].endswith(("_triton", "__main__")):
            found[HEIGHT[names[1]]].append(".".join(names).removesuffix(".__init__"))
    return sorted(found.items())


def modules_named(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a file imports by a statement or by its name, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTING:
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def test_megatron_lives_in_one_room():
    outside = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in MEGATRON_ROOMS
        for line, name in modules_named(path)
        if name.partition(".")[0] == "megatron"
    ]
    assert not outside


def test_no_folder_holds_more_than_a_dozen_files():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {folder.relative_to(PACKAGE): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {str(folder): count for folder, count in counts.items() if count > MOST_FILES}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "stress"))
def test_help_imports_nothing_heavy(script):
    said = exit_code_and_heavy_imports(script, ["--help"])
    assert said.splitlines()[-1] == "0 []", said


def test_no_module_imports_itself_by_way_of_others():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    named = {name.removesuffix(".__init__"): name for name in modules}
    left = {
        module: {named[name] for name in imported_modules(path) if name in named} for module, path in modules.items()
    }
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, "these import each other in a circle, or import such"


def imported_modules(path: Path) -> Iterator[str]:
    """Names that may be modules of the package, of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_aapo"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if (PACKAGE.parent / whole.replace(".", "/")).with_suffix(".py").exists() else node.module


def names_at_the_top(path: Path) -> set[str]:
    """Every name that a module's own level may bind, by what it defines, assigns and imports."""
    found: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
    return found


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples", "scripts"])
def test_what_a_function_imports_is_there(folder):
    """mypy does not read these folders, and an import inside a function fails only when that function runs."""
    missing = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in OURS:
                continue
            place = ROOT.joinpath(*node.module.split("."))
            module = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
            known = names_at_the_top(module) if module.exists() else set()
            known |= {entry.stem for entry in place.glob("*")} | set(
                getattr(sys.modules.get(node.module), "_EXPORTS", ())
            )
            missing += [f"{path}:{node.lineno} {node.module}.{a.name}" for a in node.names if a.name not in known]
    assert missing == []
