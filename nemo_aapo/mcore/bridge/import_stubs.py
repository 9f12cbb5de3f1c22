"""Stand-ins for packages that a library names at module level, for features of it that are not used here."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def standing_in(packages: Iterable[str]) -> Iterator[None]:
    """Inside, importing these packages gives stand-ins, unless they were imported before; afterwards the truth again.

    A stand-in answers any attribute, serves as a base class and as a decorator, and raises ImportError when called.
    """
    finder = _StandInFinder(set(packages))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandInModule)]:
            del sys.modules[name]


class _StandIn(type):
    """A class that answers any attribute with another stand-in, serves as a decorator, and can't be instantiated."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls.__name__}.{name}")


def _stand_in(name: str) -> type:
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and callable(args[0]):
            return args[0]  # @triton.jit
        if not args:
            return lambda function: function  # @triton.autotune(...)
        raise ImportError(f"{name} is not installed")

    return _StandIn(name, (), {"__new__": new})


class _StandInModule(types.ModuleType):
    """A package that gives a stand-in for any name; the import system gives it an empty path."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _stand_in(name)
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these packages, and only them."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""
