"""A Python package read as text: classes, their bases, fields and methods, by syntax tree. Nothing is imported.

It understands as much of Python as TensorRT-LLM's API needs: classes at a module's top level (also below ``if`` and
``try``), re-exports, inheritance across modules, dataclass and pydantic fields, enumerations.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.engines.trtllm.contract import FACTORY, REQUIRED, SourceText

MAKERS_OF_FIELDS = ("Field", "field")
"""Functions of pydantic and dataclasses that declare a field."""


@dataclass(frozen=True)
class ClassPlace:
    """A class in its module."""

    module: str
    """Dotted name of the module that defines it."""
    node: ast.ClassDef


@dataclass(frozen=True)
class Member:
    """A member of a class, and where it stands."""

    place: str
    """``file:line``."""
    node: ast.stmt


class Package:
    """One package in a directory (its own, or the one it lies in) or in a wheel."""

    def __init__(self, path: Path, name: str) -> None:
        """
        Raises:
            FileNotFoundError: there is no such package.
        """
        self.path, self.name = path, name
        self._wheel = zipfile.ZipFile(path) if path.is_file() and zipfile.is_zipfile(path) else None
        if self._wheel is None and path.name == name:
            self.path = path.parent
        self._modules: dict[str, ast.Module | None] = {}
        if self.module(name) is None:
            raise FileNotFoundError(f"{path}: no package {name} there (a wheel, or a directory that holds it)")

    def module(self, name: str) -> ast.Module | None:
        """The syntax tree of a module of the package; None if there is none."""
        if name not in self._modules:
            source = self._read(self.file(name))
            self._modules[name] = None if source is None else ast.parse(source)
        return self._modules[name]

    def file(self, module: str) -> str:
        """The module's file, relative to the package's parent."""
        stem = module.replace(".", "/")
        return f"{stem}/__init__.py" if self._read(f"{stem}/__init__.py") is not None else f"{stem}.py"

    def _read(self, file: str) -> str | None:
        try:
            if self._wheel is not None:
                return self._wheel.read(file).decode()
            return (self.path / file).read_text(encoding="utf-8")
        except (KeyError, FileNotFoundError, NotADirectoryError):
            return None

    # ------------------------------------------------------------------ names

    def find_class(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> ClassPlace | None:
        """A class by the name it has in a module, wherever it is defined within the package."""
        tree = self.module(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return ClassPlace(module, node)
            if isinstance(node, ast.ImportFrom):
                names = {alias.asname or alias.name: alias.name for alias in node.names}
                if name in names or "*" in names:
                    found = self.find_class(self._origin(module, node), names.get(name, name), seen)
                    if found is not None:
                        return found
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and name in _names(node):
                return self.find_class(module, node.value.id, seen)
        return None

    def names(self, module: str) -> set[str]:
        """The names that a module defines or imports at its top level, its submodules among them."""
        found: set[str] = set()
        tree = self.module(module)
        for node in _statements(tree.body) if tree else []:
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                found.add(node.name)
            else:
                found |= set(_names(node))
        return found

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The absolute name of what ``from … import`` names."""
        if not node.level:
            return node.module or ""
        is_package = self.file(module).endswith("__init__.py")
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def lineage(self, place: ClassPlace, seen: frozenset[tuple[str, str]] = frozenset()) -> Iterator[ClassPlace]:
        """The class and its bases within the package, nearest first."""
        if (place.module, place.node.name) in seen:
            return
        yield place
        for base in place.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                found = self.find_class(place.module, base.id)
                if found is not None:
                    yield from self.lineage(found, seen | {(place.module, place.node.name)})

    def member(self, place: ClassPlace, name: str) -> Member | None:
        """A field, property or method of a class or of its bases.

        A method that takes ``*args, **kwargs`` alone hands them on: what it takes says the next one of that name.
        """
        nearest = None
        for owner in self.lineage(place):
            for node in _statements(owner.node.body):
                if name in _names(node):
                    found = Member(f"{self.file(owner.module)}:{node.lineno}", node)
                    if not _hands_on(node):
                        return found
                    nearest = nearest or found
        return nearest

    def values(self, place: ClassPlace) -> set[str]:
        """The string constants that a class assigns: an enumeration's values."""
        nodes = (
            node.value for owner in self.lineage(place) for node in owner.node.body if isinstance(node, ast.Assign)
        )
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, also inside its ``if`` and ``try``."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.If | ast.Try):
                for child in getattr(node, inner, []):
                    yield from _statements(child.body if isinstance(child, ast.ExceptHandler) else [child])


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement of a class body defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _hands_on(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return bool(node.args.vararg and node.args.kwarg and not parameters(node))


def names_in(node: ast.AST) -> set[str]:
    """The names and attributes that a piece of source mentions."""
    found = (getattr(child, "id", getattr(child, "attr", None)) for child in ast.walk(node))
    return {name for name in found if name}


def field_default(node: ast.stmt) -> Any:
    """The default of a dataclass or pydantic field: a value, a ``SourceText``, ``FACTORY`` or ``REQUIRED``."""
    value = getattr(node, "value", None)
    if value is None:
        return REQUIRED
    maker = getattr(value, "func", None)
    if getattr(maker, "id", getattr(maker, "attr", None)) not in MAKERS_OF_FIELDS:
        return constant(value)
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "default_factory" in given:
        return FACTORY
    default = value.args[0] if value.args else given.get("default")
    return REQUIRED if default is None or _is_ellipsis(default) else constant(default)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """Name -> default of a method's parameters; ``self`` is left out."""
    positional = [*node.args.posonlyargs, *node.args.args]
    missing = [None] * (len(positional) - len(node.args.defaults))
    pairs = [
        *zip(positional, [*missing, *node.args.defaults], strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    return {a.arg: REQUIRED if d is None else constant(d) for a, d in pairs if a.arg not in ("self", "cls")}


def constant(node: ast.expr) -> Any:
    """The value of a literal, else its text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return SourceText(ast.unparse(node))


def literal_words(node: ast.stmt) -> set[str]:
    """The words of all ``Literal[...]`` in a field's annotation."""
    annotation = getattr(node, "annotation", None) or ast.Constant(None)
    literals = (
        part.slice
        for part in ast.walk(annotation)
        if isinstance(part, ast.Subscript) and getattr(part.value, "id", getattr(part.value, "attr", "")) == "Literal"
    )
    leaves = (leaf.value for literal in literals for leaf in ast.walk(literal) if isinstance(leaf, ast.Constant))
    return {word for word in leaves if isinstance(word, str)}
