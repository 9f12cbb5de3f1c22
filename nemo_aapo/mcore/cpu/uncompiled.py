"""Leaves mcore's fused functions as plain Python where there is no GPU to run them.

mcore hands them to ``torch.compile`` as it is imported, which imports torch's whole compiler (0.6 s of CPU), although
none of them is called without a GPU. mcore has a switch for it, in a module that its own import runs first: so the
switch is turned as soon as that module is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

SWITCH = "megatron.core.jit"


def install() -> None:
    """From now on mcore is imported so; once it was imported there is nothing left to do."""
    if SWITCH not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module with the switch, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != SWITCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader's work, and then the switch."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        import torch

        self._loader.exec_module(module)
        if not torch.cuda.is_available():
            module.disable_jit_fuser()
