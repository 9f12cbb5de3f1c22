"""What a rank's start imports, and what it leaves alone: modules are counted, as seconds depend on the machine."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo import lines
from nemo_aapo.config.command_line import FROZEN
from nemo_aapo.mcore.bridge import loader
from nemo_aapo.mcore.bridge.import_stubs import standing_in
from nemo_aapo.models.directory import ARCHITECTURES
from nemo_aapo.utils.libraries import importing
from tests.training_runs import make_input, settings

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, runpy, sys
found, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
json.dump(sorted(sys.modules), open(found, "w"))
"""
AT_MOST = 3550
"""Modules; 3,460 when this was written, 5,000 with all of NeMo, Megatron-Bridge and torch's compiler."""


def python(code: str, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_rank_of_a_job_imports_one_family_of_models_and_neither_nemo_nor_a_compiler(tmp_path):
    given = make_input(tmp_path)
    words = ["rewards=[{name: integer, weight: 1.0}]", "validation.reward=integer", "reward_runner.workers=0"]
    words = settings(given, tmp_path / "run", *words, "trainer.max_steps=1", "trainer.val_check_interval=0")
    train = str(ROOT / "scripts" / "train.py")
    page = python(RUN, str(tmp_path / "unused"), train, *words, "--cfg", "job")
    (tmp_path / f"{FROZEN}.yaml").write_text(page)
    python(RUN, str(tmp_path / "found"), train, "--config-path", str(tmp_path), "--config-name", FROZEN)
    assert (tmp_path / "run" / "finished").exists()
    modules = json.loads((tmp_path / "found").read_text())
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & {"nemo", "lightning", "pandas", "math_verify", "hydra_runner", "aiohttp"}
    assert "torch._inductor.compile_fx" not in modules
    bridges = {name for name in modules if name.startswith("megatron.bridge.models.") and name.endswith("_bridge")}
    assert {name.split(".")[3] for name in bridges} == {"qwen", "conversion"}
    assert len(modules) < AT_MOST


def test_each_supported_architecture_has_a_bridge_that_is_found_without_importing_the_others():
    assert None not in [loader.bridge_module(architecture) for architecture in ARCHITECTURES]
    assert loader.bridge_module("NoSuchForCausalLM") is None
    known = loader.known_architectures()
    assert known == [name for name in known if name[0].isupper()]  # some are registered by a constant's name
    assert {*ARCHITECTURES} <= {*known}
    deeper = loader.bridge_module("Exaone4ForCausalLM")  # the newest Bridge alone has it
    expected = f"{loader.MODELS}.exaone.exaone4.exaone4_bridge" if lines.installed() is lines.NEWEST else None
    assert deeper == expected


@pytest.mark.slow
def test_a_package_whose_init_was_put_off_gives_all_that_it_defines_once_it_is_asked():
    code = """
import sys
from nemo_aapo.utils.libraries import quiet
from nemo_aapo.mcore.bridge.loader import auto_bridge_class
quiet()
auto_bridge = auto_bridge_class("LlamaForCausalLM")
assert "megatron.bridge.models.gemma" not in sys.modules
import megatron.bridge
assert megatron.bridge.AutoBridge is auto_bridge
from megatron.bridge.models import Gemma2ModelProvider, Qwen3ModelProvider
from megatron.bridge.models.llama import Llama31ModelProvider8B
assert not {"transformer_engine", "timm", "mamba_ssm"} & set(sys.modules)
try:
    megatron.bridge.NoSuchName
except AttributeError:
    print("honest")
"""
    assert python(code) == "honest\n"


def test_stand_ins_are_there_inside_only_and_never_instead_of_what_is_imported():
    with standing_in(["no_such_package", "json"]):
        import no_such_package.part as part

        assert part.anything.at.all is not None
        with pytest.raises(ImportError, match="anything is not installed"):
            part.anything(1, 2)
        assert importlib.import_module("json") is json
    assert not [name for name in sys.modules if name.startswith("no_such_package")]
    with pytest.raises(ImportError):
        importlib.import_module("no_such_package")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["training.build", "learner.policy", "checkpoint.checkpointer", "mcore.groups"])
def test_transformer_engine_reads_its_switches_after_they_are_set(tmp_path, first):
    """megatron-core imports it in passing, long before a precision is decided."""
    stand_in = "import os\nprint(os.environ['NVTE_FP8_BLOCK_SCALING_FP32_SCALES'], flush=True)\nos._exit(0)\n"
    (tmp_path / "transformer_engine.py").write_text(stand_in)
    code = "import importlib, sys; sys.path.insert(0, sys.argv[1]); importlib.import_module('nemo_aapo.' + sys.argv[2])"
    assert set(python(code, str(tmp_path), first).split()) == {"1"}


def test_garbage_in_cycles_is_searched_for_again_after_an_import_that_failed():
    with pytest.raises(RuntimeError, match="False"), importing():
        raise RuntimeError(gc.isenabled())
    assert gc.isenabled()
