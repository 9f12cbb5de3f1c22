"""Heavy libraries without their noise: what they say that no reader of a training run can use."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator


def quiet() -> None:
    """Drop warnings that libraries give at import about packages that are not needed here. Errors stay.

    Call it before they are imported. It imports nothing itself.
    """
    for name in (
        "nv_one_logger",  # telemetry, off, says at each import that it is off
        "megatron.bridge.utils.fusions",  # says which GPU kernels a CPU lacks
        "transformers.configuration_utils",  # the Bridge's own use of a deprecated argument
        "transformers.modeling_utils",
        "transformers.integrations.tensor_parallel",  # says in every process group what it does not cut
        "megatron.bridge.models.conversion.param_mapping",  # warns of each tensor in another dtype, as was asked for
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # mcore calls what torch 2.13 has renamed; GPU stacks run a torch that has the old names only
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # torch to itself, as its checkpoint reader asks mcore's tensors what they are
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    for library in ("megatron", "nemo", "lightning"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}\.")


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
