"""Megatron-Bridge, imported in the parts that are used: the conversion, and the bridge of one architecture.

``import megatron.bridge`` imports every model family that it knows, which takes a rank a second, and packages that
exist on GPUs only. Here the ``__init__`` of the packages on the way is put off until someone asks for what it defines.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.mcore import replaced
from nemo_aapo.mcore.bridge.import_stubs import standing_in
from nemo_aapo.mcore.lines import line
from nemo_aapo.utils.libraries import importing

OPTIONAL_DEPENDENCIES = ("transformer_engine", "triton", "mamba_ssm", "causal_conv1d", "mlflow", "timm", "modelopt")
"""Packages that Megatron-Bridge imports at module level for models and features that we don't use."""

CORE_FIRST = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.models.vision.clip_vit_model",
    "megatron.core.models.T5.t5_model",
    "megatron.core.models.multimodal.llava_model",
    "megatron.core.post_training.modelopt.gpt.model_specs",
)
"""mcore modules that decide at import time whether TransformerEngine is there: they must see the truth."""

MODELS = "megatron.bridge.models"

MODULES_WITH_CUDA = (f"{MODELS}.conversion.param_mapping",)
"""Modules of the Bridge that get ``fake_torch`` where there is no GPU."""

_installed = _olmoe_installed = False


def auto_bridge_class(architecture: str) -> Any:  # the Bridge has no types
    """``megatron.bridge.AutoBridge``, able to convert models of an architecture such as ``Qwen2ForCausalLM``.

    Raises:
        DriftError: the installed Bridge is not the one that this package was written for.
    """
    module = bridge_module(architecture)
    later = ["megatron.bridge", MODELS, module.rpartition(".")[0]] if module else []
    with importing():
        for name in CORE_FIRST:
            importlib.import_module(name)
    with importing(), _optional_dependencies(), _put_off(later):
        auto_bridge = importlib.import_module(f"{MODELS}.conversion.auto_bridge").AutoBridge
        importlib.import_module(module or MODELS)
    _install_patches()
    if architecture == "OlmoeForCausalLM":
        _map_experts_one_by_one()
    return auto_bridge


def lora_class() -> Any:  # the Bridge has no types
    """``megatron.bridge.peft.lora.LoRA``, and the truth about TransformerEngine.

    Without it mcore has mocks in place of its classes, which the Bridge takes for real ones and fails on.

    Raises:
        DriftError: as ``auto_bridge_class``.
    """
    with importing(), _optional_dependencies():
        lora = importlib.import_module("megatron.bridge.peft.lora")
        utils = importlib.import_module("megatron.bridge.peft.utils")
    replaced.check(replaced.OF_LORA)
    if importlib.util.find_spec("transformer_engine") is None:
        vars(utils)["HAVE_TE"] = False
    return lora.LoRA


def known_architectures() -> list[str]:
    """All that the installed Megatron-Bridge registers a map for, whether it works here or not; nothing is imported."""
    source = r"MegatronModelBridge\.register_bridge\(\s*source=[\"']?(\w+)"
    found = set()
    for path in _bridge_files():
        text = path.read_text(encoding="utf-8")
        constants = dict(re.findall(r"^(\w+) = [\"'](\w+)[\"']", text, re.MULTILINE))
        found |= {constants.get(name, name) for name in re.findall(source, text)}
    return sorted(found)


def bridge_module(architecture: str) -> str | None:
    """The module that registers the architecture's bridge; None: it is not found by its text, so import all."""
    source = rf"^@MegatronModelBridge\.register_bridge\(\s*source=[\"']?{re.escape(architecture)}\b"
    for path in _bridge_files():
        if re.search(source, path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{MODELS}.{'.'.join(path.relative_to(_models_folder()).with_suffix('').parts)}"
    return None


def _bridge_files() -> list[Path]:
    """The modules that register a map, without importing any."""
    return sorted(_models_folder().rglob("*_bridge.py"))


def _models_folder() -> Path:
    spec = importlib.util.find_spec("megatron.bridge")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("megatron-bridge is not installed: docs/guide/install.md says how to get it")
    return Path(spec.submodule_search_locations[0]) / "models"


def _optional_dependencies() -> contextlib.AbstractContextManager[None]:
    return standing_in(name for name in OPTIONAL_DEPENDENCIES if importlib.util.find_spec(name) is None)


@contextlib.contextmanager
def _put_off(packages: Iterable[str]) -> Iterator[None]:
    """Inside, these packages are imported without running their ``__init__``: first use of a name runs it."""
    finder = _PutOffFinder(set(packages))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _PutOffFinder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PutOffLoader(spec.loader)
        return spec


class _PutOffLoader(importlib.abc.Loader):
    """Another loader's work, done when the module is asked for a name that it does not have yet (PEP 562)."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        def run_and_get(name: str) -> Any:
            if name.startswith("__") and name not in ("__all__", "__version__"):  # what Python and others probe for
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            if module.__dict__.pop("__getattr__", None) is not None:
                with _optional_dependencies():
                    self.loader.exec_module(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = run_and_get


def _install_patches() -> None:
    """Change what ``replaced.OF_BRIDGE`` lists. Idempotent."""
    global _installed
    if _installed:
        return
    import torch

    from nemo_aapo.mcore.cpu import fake_torch

    replaced.check(replaced.OF_BRIDGE)
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    AutoMapping.register_module_type("RowParallelThenNorm", "row")  # of mcore/cpu/layers.py
    line.mend_bridge()
    if not torch.cuda.is_available():
        fake_torch.give(MODULES_WITH_CUDA)
    _installed = True


def _map_experts_one_by_one() -> None:
    """Change what ``replaced.OF_OLMOE`` lists. Idempotent."""
    global _olmoe_installed
    if _olmoe_installed:
        return
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping
    from megatron.bridge.models.olmoe.olmoe_bridge import OlMoEBridge

    replaced.check(replaced.OF_OLMOE)
    original = OlMoEBridge.mapping_registry

    def mapping_registry(self: Any) -> MegatronMappingRegistry:
        one, file = "decoder.layers.*.mlp.experts.local_experts.*", "model.layers.*.mlp.experts.*"
        first = GatedMLPMapping(
            f"{one}.linear_fc1.weight", gate=f"{file}.gate_proj.weight", up=f"{file}.up_proj.weight"
        )
        second = AutoMapping(f"{one}.linear_fc2.weight", f"{file}.down_proj.weight")
        return MegatronMappingRegistry(*original(self).mappings, first, second)

    OlMoEBridge.mapping_registry = mapping_registry
    _olmoe_installed = True
