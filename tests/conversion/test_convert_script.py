"""scripts/convert.py: what it refuses before anything is loaded, what it prints, and ranks that it starts itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def convert():
    return load_script("convert")


@pytest.fixture
def changed(tiny_models, tmp_path):
    """A copy of a model whose config.json says something else."""

    def change(name: str, **values) -> Path:
        target = tmp_path / "changed"
        shutil.copytree(tiny_models[name], target)
        config = json.loads((target / "config.json").read_text())
        config.pop("rope_parameters", None)  # where transformers 5 wrote it
        (target / "config.json").write_text(json.dumps({**config, **values}))
        return target

    return change


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("qwen2", {"architectures": ["Gemma2ForCausalLM"]}, "TransformerEngine"),
        ("qwen2", {"architectures": ["BertForMaskedLM"]}, "not among those that were tested"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type yarn gets lost"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
    ],
)
def test_a_model_whose_twin_would_compute_something_else_is_refused(convert, changed, capsys, name, values, reason):
    path = changed(name, **values)
    assert convert.main(["hf-to-megatron", str(path), "--out", str(path.parent / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (path.parent / "out").exists()


def test_wrong_paths_and_layouts_are_refused_with_what_was_found_there(convert, tiny_models, tmp_path, capsys):
    model, run = str(tiny_models["qwen3"]), tmp_path / "run"
    run.mkdir()
    file = tmp_path / "file"
    file.touch()
    out = ["--out", str(tmp_path / "out")]
    for words, said in (
        (["megatron-to-hf", model, *out], "is a Hugging Face model already"),
        (["megatron-to-hf", str(tmp_path / "nowhere"), *out], "no such directory"),
        (["megatron-to-hf", "~nobody_of_that_name/run", *out], "~nobody_of_that_name/run: no such directory"),
        (["megatron-to-hf", str(run), *out], "neither a Hugging Face model"),
        (["hf-to-megatron", model, "--out", str(run)], "exists already"),
        (["hf-to-megatron", model, "--out", str(file / "out")], f"{file} is a file, where a directory is needed"),
        (["hf-to-megatron", model, "--out", "/proc/out"], "nothing can be written in /proc ("),
        (["hf-to-megatron", model, *out, "--tensor-model-parallel-size", "3"], "does not divide"),
        (["verify", model, model], "verify HF_DIR"),
        (["inspect", model, "--base", model], "--base has no effect"),
    ):
        assert convert.main(words) == 2, words
        assert said in capsys.readouterr().err
    (run / "config.yaml").write_text("model: {path: /gone}")
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    assert convert.main(["megatron-to-hf", str(run), *out]) == 2
    assert "its base model /gone is not there (no config.json); name it by --base DIR" in capsys.readouterr().err


def test_inspect_reads_no_weights(convert, tiny_models, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2_tied"], path)
    weights = path / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    content = weights.read_bytes()
    weights.write_bytes(content[:header] + bytes(len(content) - header))  # zeros instead of weights
    assert convert.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Qwen2ForCausalLM (trains and converts)" in text
    assert "158,784 in 50 tensors of F32" in text


@pytest.mark.slow
def test_ranks_are_started_where_a_layout_has_several(tiny_models, tmp_path):
    words = ["verify", str(tiny_models["qwen3"]), "--tensor-model-parallel-size", "2"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "convert.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "46, equal to the bit" in done.stdout
    assert done.stdout.endswith("verified\n")
    assert done.stderr == ""


def test_what_is_not_on_the_list_is_refused_but_shown():
    from nemo_aapo.models.families import supported

    names = ("Llama", "Exaone4", "Olmoe", "Gemma2", "Mistral")
    text = supported([f"{name}ForCausalLM" for name in names])
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["LlamaForCausalLM"].endswith("trains and converts")
    assert lines["MistralForCausalLM"].endswith(" trains and converts")
    assert "TransformerEngine" in lines["Gemma2ForCausalLM"]
    assert lines["OlmoeForCausalLM"].endswith(" trains and converts")
    assert "not tested here, refused" in lines["Exaone4ForCausalLM"]
