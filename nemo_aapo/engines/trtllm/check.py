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
from nemo_aapo.engines.trtllm.contract import ANY, REQUIRED, Contract, LibraryClass, Method
from nemo_aapo.engines.trtllm.package_source import (
    ClassPlace,
    Package,
    constant,
    field_default,
    literal_words,
    names_in,
    parameters,
)

PACKAGE, RAY = "tensorrt_llm", "ray"


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
    agreed = contract_with(package)
    ray = installed(RAY)
    differences = [*compare(package, agreed), *(ray_imports(package, Package(ray, RAY)) if ray else [])]
    for difference in differences:
        print(difference)
    count = len(differences)
    what = f"{count or 'no'} difference{'s' * (count != 1)}"
    print(f"{path}, version {version(package)}: {what} from the contract with version {agreed.version}")
    return int(count > 0)


def installed(name: str = PACKAGE) -> Path | None:
    """The directory of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def ray_difference() -> str:
    """Why the installed Ray can't start the workers of the installed TensorRT-LLM, or of 1.2; empty if it can."""
    path, library, wanted = installed(RAY), installed(), contract.RAY_IMPORTS
    if path is None:
        return "not installed"
    ray = Package(path, RAY)
    if library is not None:
        return "; ".join(str(difference) for difference in ray_imports(Package(library, PACKAGE), ray))
    if ray.find_class(wanted.module, wanted.name) is None:
        return f"the installed one has no {wanted.name} in {wanted.module}"
    return ""


def contract_with(package: Package) -> Contract:
    """The contract of the package's generation, by the arguments that its engine has."""
    place = package.find_class(contract.LLM_ARGS.module, contract.LLM_ARGS.name)
    every = {name for known in contract.CONTRACTS for name in known.llm_args}
    return contract.contract_of([name for name in every if place and package.member(place, name)])


def version(package: Package) -> str:
    """What the package's ``version.py`` says."""
    tree = package.module(f"{PACKAGE}.version")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(constant(node.value))
    return "unknown"


def compare(package: Package, agreed: Contract = contract.V1_2) -> list[Difference]:
    """All differences, in the contract's order."""
    found = [difference for expected in agreed.classes for difference in _class(package, expected)]
    return [*found, *_environment(package, agreed)]


def ray_imports(package: Package, ray: Package) -> list[Difference]:
    """Names that the package imports of Ray and that this Ray doesn't have, but for those that it only tries."""
    return [
        Difference(f"{package.file(module)}:{node.lineno}", f"imports {alias.name} of {node.module}, which has none")
        for module in contract.RAY_USERS
        for node in _untried(package.module(module) or ast.Module([], []))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == RAY
        for alias in node.names
        if alias.name not in ray.names(node.module)
    ]


def _untried(node: ast.AST) -> Iterator[ast.AST]:
    """What a syntax tree holds outside of ``try``."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Try):
            yield child
            yield from _untried(child)


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
    values = package.values(place)
    for value in sorted(set(expected.values) - values):
        yield _lacks(package, place, f"member with the value {value!r}")
    for value in sorted(values - set(expected.values)) if expected.closed else []:
        if not value.startswith("_"):
            yield Difference(
                f"{package.file(place.module)}:{place.node.lineno}",
                f"{place.node.name} has a member with the value {value!r}, which the contract doesn't know",
            )
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
    if expected is not ANY and (type(found), found) != (type(expected), expected):  # True is not 1
        yield Difference(place, f"{what}: default {found!r}, the contract says {expected!r}")


def _method(package: Package, place: ClassPlace, name: str, expected: Method) -> Iterator[Difference]:
    member = package.member(place, name)
    if member is None or not isinstance(member.node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield _lacks(package, place, f"method {name}")
        return
    what = f"{place.node.name}.{name}"
    if isinstance(member.node, ast.AsyncFunctionDef) != expected.coroutine:
        yield Difference(member.place, f"{what}: is {'not ' * expected.coroutine}a coroutine")
    decorators = {name for decorator in member.node.decorator_list for name in names_in(decorator)}
    for name in sorted(set(expected.decorators) - decorators):
        yield Difference(member.place, f"{what}: is not decorated by {name}")
    for name in sorted(set(expected.calls) - names_in(member.node)):
        yield Difference(member.place, f"{what}: doesn't call {name}")
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


def _environment(package: Package, agreed: Contract) -> Iterator[Difference]:
    for variable, module in agreed.readers.items():
        tree = package.module(module)
        words = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)) if tree else ()
        if variable not in words:
            yield Difference(f"{package.file(module)}:1", f"doesn't read the environment variable {variable}")


if __name__ == "__main__":
    raise SystemExit(main())
