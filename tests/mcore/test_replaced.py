"""What is changed in megatron-core and Megatron-Bridge is refused where its source is another one."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.errors import DriftError
from nemo_aapo.mcore import replaced

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {
    function.name: function
    for function in (*replaced.ON_CPU, *replaced.EVERYWHERE, *replaced.OF_BRIDGE, *replaced.OF_LORA)
}


def _another(*args, **kwargs):
    """Not what a library brings."""


def _refusals(name):
    """What is said of another function in the place of a library's, and of none."""
    from nemo_aapo.mcore.bridge import loader

    loader.auto_bridge_class("Qwen2ForCausalLM")
    loader.lora_class()
    function = FUNCTIONS[name]
    place, attribute = function.owner()
    original = getattr(place, attribute)
    said = []
    try:
        for change in (lambda: setattr(place, attribute, _another), lambda: delattr(place, attribute)):
            change()
            with pytest.raises(DriftError) as refusal:
                replaced.check([function])
            said.append(str(refusal.value))
    finally:
        setattr(place, attribute, original)
    return said


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_another_source_is_refused_by_name_and_version(ranks, name):
    package = FUNCTIONS[name].package
    version = re.escape(f"{package} {importlib.metadata.version(package)}: {name} ")
    [[other, gone]] = ranks.run(_refusals, name)
    assert re.match(version + "has another source .*sha256 .*requirements/", other)
    # a method that is gone may leave its base class's in its place
    assert re.match(version + "(is gone|has another source) .*requirements/", gone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name", "install"),
    [
        ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32", "cpu.patches as m; m.install()"),
        ("megatron.core.models.gpt.gpt_model", "GPTModel._postprocess", "cpu.patches as m; m.install()"),
        (
            "megatron.bridge.models.conversion.param_mapping",
            "MegatronParamMapping.scatter_to_tp_ranks",
            "bridge.loader as m; m.auto_bridge_class('Qwen2ForCausalLM')",
        ),
    ],
)
def test_nothing_is_changed_where_one_source_is_another(place, name, install):
    """In a process of its own, where nothing was installed before."""
    code = f"""
import warnings
warnings.simplefilter("ignore")
import nemo_aapo.mcore.bridge.loader as loader
from nemo_aapo.errors import DriftError
from nemo_aapo.mcore import replaced
checked, replaced.check = replaced.check, lambda functions: None
loader._installed = True
loader.auto_bridge_class("Qwen2ForCausalLM")
loader._installed, replaced.check = False, checked
import {place} as place
place.{name} = lambda *args: None
from megatron.core.tensor_parallel import random
add = random.CudaRNGStatesTracker.add
try:
    import nemo_aapo.mcore.{install}
except DriftError as error:
    assert random.CudaRNGStatesTracker.add is add
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert f"{place}:{name} has another source" in done.stdout, done.stderr
