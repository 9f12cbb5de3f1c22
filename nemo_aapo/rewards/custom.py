"""A user's own Python function as a reward."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt
from nemo_aapo.utils.libraries import load_file


@dataclass(frozen=True)
class Custom(Reward):
    """Calls ``fn(prompt: str, completion: str, answer: str, **info) -> float``.

    ``info`` holds ``num_tokens`` (completion tokens) and ``finish_reason`` (``"stop"`` or ``"length"``); a function
    takes them by name or as ``**info``. It is imported in the worker processes only, and may be slow, print or crash:
    it costs its own item at most the runner's limit.
    """

    function: str
    """``package.module:function`` or ``path/to/file.py:function``."""

    kind: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        module, _, name = str(self.function).rpartition(":")
        if not module or not name.isidentifier():
            raise ValueError(
                f"reward 'custom': function must be 'package.module:function' or 'path/to/file.py:function', "
                f"not {self.function!r}"
            )
        if module.endswith(".py") and not Path(module).is_file():
            raise ValueError(f"reward 'custom': there is no file {module} (working directory: {Path.cwd()})")

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.rpartition(":")[2]

    @property
    def in_process(self) -> bool:
        """False: unknown code may hang or crash."""
        return False

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Whatever the function returns."""
        function = _load_function(self.function)
        info = {"num_tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
        return function(prompt.text, text, prompt.answer, **info)

    def depends_on(self) -> dict[str, Any]:
        """A digest of the function's file, wherever that lies, but not of what the file imports."""
        module, _, name = self.function.rpartition(":")
        file = Path(module) if module.endswith(".py") else _module_file(module)
        text = file.read_bytes() if file is not None else None
        return {"function": name, "source": hashlib.sha256(text).hexdigest()[:16] if text is not None else None}

    def load(self) -> None:
        """Import the function and see that it can be called."""
        _load_function(self.function)


@functools.cache
def _load_function(path: str) -> Callable[..., float]:
    module_path, _, name = path.rpartition(":")
    module = load_file(Path(module_path)) if module_path.endswith(".py") else importlib.import_module(module_path)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{module_path} has no function {name!r}{hint}")
    try:
        inspect.signature(function).bind("", "", "", num_tokens=0, finish_reason="stop")
    except TypeError as error:
        raise ValueError(f"{path} must be callable as fn(prompt, completion, answer, **info): {error}") from None
    return function


def _module_file(module: str) -> Path | None:
    """Where a module's source lies, found without importing it or its packages; None if it can't be found."""
    spec = None
    path: Sequence[str] = [*sys.path, str(Path.cwd())]
    for name in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
