"""Importing: heavy libraries without their noise, and a user's own files."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def quiet() -> None:
    """Drop warnings that libraries give at import about packages that are not needed here. Errors stay.

    Call it before they are imported. It imports nothing itself.
    """
    for name in (
        "torch.utils.cpp_extension",  # says that a CUDA build finds no GPU
        "nv_one_logger",  # telemetry, off, says at each import that it is off
        "megatron.bridge.utils.fusions",  # says which GPU kernels a CPU lacks
        "megatron.bridge.utils.import_utils",  # and which classes of TransformerEngine
        "megatron.core.models.gpt.gpt_model",  # praises another model class
        "transformers.configuration_utils",  # the Bridge's own use of a deprecated argument
        "transformers.modeling_utils",
        "transformers.integrations.tensor_parallel",  # says in every process group what it does not cut
        "megatron.bridge.models.conversion.param_mapping",  # warns of each tensor in another dtype, as was asked for
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(_is_error)  # some set their own level as they are imported
    # mcore calls what torch 2.13 has renamed; GPU stacks run a torch that has the old names only
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # torch to itself, as its checkpoint reader asks mcore's tensors what they are
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    for library in ("megatron", "nemo", "lightning"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}\.")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def import_nemo() -> None:
    """Import NeMo; its errors go to stderr, all else that it logs to its log files only.

    It imports a thousand modules that no other part needs, so ranks other than 0 do without. ``nemo.core`` comes first:
    ``exp_manager`` imported alone asks for packages that ``nemo-toolkit[core]`` does not bring.
    """
    quiet()
    with importing():
        import nemo.core.config  # noqa: F401
        from nemo.utils import logging as nemo_logging
    nemo_logging.captureWarnings(False)  # NeMo drops all of a category once one library's are filtered
    for handler in logging.getLogger("nemo_logger").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what devices the idle trainer has found


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, large libraries are imported without Python's search for garbage in cycles.

    It would go through all that they have made so far again and again, and once more at exit: a third of the CPU time.
    What is there afterwards is left out of later searches.
    """
    modules, searching = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if searching:
            gc.enable()


@functools.cache
def load_file(path: Path) -> ModuleType:
    """The file as a module, with its folder on the import path, as ``python file.py`` has it.

    It is in ``sys.modules`` before it runs, under the file's own name: dataclasses, pickle and the processes that
    ``multiprocessing`` spawns find classes and functions by the name of their module.
    """
    path = path.resolve()
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file that can be imported")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ImportError) and error.name != name:
            raise ImportError(
                f"{error}. {path.name} can import what lies beside it, by absolute imports (import NAME), and what is "
                "installed or on PYTHONPATH; a file of a package is named as package.module:NAME"
            ).with_traceback(error.__traceback__) from error
        raise
    return module


def _module_name(path: Path) -> str:
    """The file's stem, or a name of its own where another module has that one, or it is no name."""
    stem = path.stem
    free = stem.isidentifier() and stem not in sys.modules and stem not in sys.stdlib_module_names
    other = importlib.machinery.PathFinder.find_spec(stem) if free else None
    if free and (other is None or (other.origin and Path(other.origin).resolve() == path)):
        return stem
    return f"nemo_aapo_custom_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
