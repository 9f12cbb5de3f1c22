"""Compares the contract (contract.py) with a real TensorRT-LLM, without importing it.

    python -m nemo_aapo.engines.trtllm.check            the installed package
    python -m nemo_aapo.engines.trtllm.check PATH       a wheel, or a directory that holds tensorrt_llm/

Prints each difference with its file and line. Exit code: 0 none, 1 some, or no package found.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm.contract import REQUIRED, LibraryClass, Method
from nemo_aapo.engines.trtllm.package_source import (
    ClassPlace,
    Package,
    constant,
    field_default,
    literal_words,
    parameters,
)

PACKAGE = "tensorrt_llm"


@dataclass(frozen=True)
class Difference:
    """One way in which the package is not what the adapter expects."""

    place: str
    """``file:line``, relative to the package's parent."""
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_aapo.engines.trtllm.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("path", nargs="?", type=Path, help="a wheel or a directory; default: the installed package")
    path = parser.parse_args(argv).path or installed()
    if path is None:
        print(f"{PACKAGE} is not installed: name a wheel or a directory that holds {PACKAGE}/")
        return 1
    try:
        package = Package(path, PACKAGE)
    except FileNotFoundError as error:
        print(error)
        return 1
    differences = compare(package)
    for difference in differences:
        print(difference)
    count = len(differences)
    what = f"{count or 'no'} difference{'s' * (count != 1)}"
    print(f"{path}, version {version(package)}: {what} from the contract with version {contract.VERSION}")
    return int(count > 0)


def installed() -> Path | None:
    """The directory of the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def version(package: Package) -> str:
    """What the package's ``version.py`` says."""
    tree = package.module(f"{PACKAGE}.version")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(constant(node.value))
    return "unknown"


def compare(package: Package, classes: Sequence[LibraryClass] = contract.CLASSES) -> list[Difference]:
    """All differences, in the contract's order."""
    found = [difference for expected in classes for difference in _class(package, expected)]
    return [*found, *_environment(package)]


def _class(package: Package, expected: LibraryClass) -> Iterator[Difference]:
    if package.module(expected.module) is None:
        yield Difference(f"{package.file(expected.module)}:1", f"no such module; {expected.name} was there")
        return
    place = package.find_class(expected.module, expected.name)
    if place is None:
        yield Difference(f"{package.file(expected.module)}:1", f"no class {expected.name}")
        return
    for name, default in expected.fields.items():
        yield from _field(package, place, name, default)
    for name, method in expected.methods.items():
        yield from _method(package, place, name, method)
    for name in expected.attributes:
        if package.member(place, name) is None:
            yield _lacks(package, place, f"attribute {name}")
    for value in sorted(set(expected.values) - package.values(place)):
        yield _lacks(package, place, f"member with the value {value!r}")
    for name, words in expected.literals.items():
        yield from _literal(package, place, name, set(words))


def _lacks(package: Package, place: ClassPlace, what: str) -> Difference:
    return Difference(f"{package.file(place.module)}:{place.node.lineno}", f"{place.node.name} has no {what}")


def _field(package: Package, place: ClassPlace, name: str, default: object) -> Iterator[Difference]:
    member = package.member(place, name)
    if member is None:
        yield _lacks(package, place, f"field {name}")
        return
    yield from _default(member.place, f"{place.node.name}.{name}", field_default(member.node), default)


def _default(place: str, what: str, found: object, expected: object) -> Iterator[Difference]:
    if (type(found), found) != (type(expected), expected):  # True is not 1
        yield Difference(place, f"{what}: default {found!r}, the contract says {expected!r}")


def _method(package: Package, place: ClassPlace, name: str, expected: Method) -> Iterator[Difference]:
    member = package.member(place, name)
    if member is None or not isinstance(member.node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield _lacks(package, place, f"method {name}")
        return
    what = f"{place.node.name}.{name}"
    if isinstance(member.node, ast.AsyncFunctionDef) != expected.coroutine:
        yield Difference(member.place, f"{what}: is {'not ' * expected.coroutine}a coroutine")
    found = parameters(member.node)
    for parameter, default in expected.parameters.items():
        if parameter not in found:
            yield Difference(member.place, f"{what}: no parameter {parameter}")
        else:
            yield from _default(member.place, f"{what}({parameter})", found[parameter], default)
    for parameter, default in found.items():
        if default is REQUIRED and parameter not in expected.parameters:
            yield Difference(member.place, f"{what}: parameter {parameter} is required, the contract doesn't know it")


def _literal(package: Package, place: ClassPlace, name: str, words: set[str]) -> Iterator[Difference]:
    member = package.member(place, name)
    if member is not None and (found := literal_words(member.node)) != words:
        yield Difference(
            member.place, f"{place.node.name}.{name}: one of {sorted(found)}, the contract says {sorted(words)}"
        )


def _environment(package: Package) -> Iterator[Difference]:
    for variable, module in contract.ENVIRONMENT_READERS.items():
        tree = package.module(module)
        words = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)) if tree else ()
        if variable not in words:
            yield Difference(f"{package.file(module)}:1", f"doesn't read the environment variable {variable}")


if __name__ == "__main__":
    raise SystemExit(main())
