"""Leaves mcore's fused functions as plain Python where there is no GPU to run them.

mcore hands them to ``torch.compile`` as it is imported, which imports torch's whole compiler (0.6 s of CPU), although
none of them is called without a GPU. Most go by a switch of mcore's, in a module that its own import runs first: it is
turned as soon as that module is there. The router of later releases compiles a method for inference besides, and is
imported with a ``torch.compile`` that does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

SWITCH, ROUTER = "megatron.core.jit", "megatron.core.transformer.moe.router"


def install() -> None:
    """From now on mcore is imported so; once it was imported there is nothing left to do."""
    if SWITCH not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the two modules, once each."""

    def __init__(self) -> None:
        self._to_come = {SWITCH, ROUTER}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._to_come:
            return None
        self._to_come.remove(fullname)
        if not self._to_come:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader's work without compiling, and then the switch."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        import torch

        if torch.cuda.is_available():
            self._loader.exec_module(module)
            return
        compiling = torch.compile
        vars(torch)["compile"] = _uncompiled
        try:
            self._loader.exec_module(module)
        finally:
            vars(torch)["compile"] = compiling
        if module.__name__ == SWITCH:
            module.disable_jit_fuser()


def _uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """The function as it is, with ``torch.compile``'s two ways to decorate it."""
    return (lambda decorated: decorated) if function is None else function
