"""scripts/reference_rewards.py refuses before torch is imported, and starts ranks where it should."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "reference_rewards.py"


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The settings without a default, and a model directory without tensors."""
    model = tmp_path / "model"
    model.mkdir()
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **shape, **heads}))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return [f"model.path={model}", "data.train=t", "data.validation=v", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reference_rewards_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3", "--shards", "3"], "--shard must lie between 0 and 2"),
        (["--shard=-1", "--shards=3"], "--shard must lie between 0 and 2"),
        (["--shard", "1"], "--shard I and --shards N go together"),
        (["--shards", "x", "--shard", "1"], "argument --shards: invalid int value"),
        (["--merge", "--status"], "one at a time"),
        (["--merge", "--shard", "0", "--shards", "2"], "one at a time"),
        (["--shrad", "0"], "--shrad"),
        (["algorithm=gpg"], "algorithm.reference=null: only cached reference rewards are stored"),
        (["algorithm=aapo_paper"], "algorithm.reference=online: only cached"),
        (["model.path=nowhere"], "model.path=nowhere: no such directory"),
        (["algorithm.reference_stor=x"], "did you mean 'algorithm.reference_store'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(script, words, capsys, options, message):
    assert script.main([*words, *options]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_a_refusal_comes_before_torch_is_imported(words):
    code = (
        f"import runpy, sys; sys.argv = ['reference_rewards.py', *{[*words, 'algorithm=gpg']!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'megatron', 'nemo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n", done.stderr


def test_help_names_the_options_and_the_settings(script, capsys):
    assert script.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--shard I --shards N", "--merge", "--status", "model.path="))


def test_several_devices_are_started_as_ranks_of_the_same_command_unless_this_is_one(script, words, monkeypatch):
    started = []
    monkeypatch.setattr(script.local, "run_ranks", lambda *what, **limits: started.append(what) or 7)
    argv = [*words, "--shard", "1", "--shards", "4", "trainer.devices=2"]
    monkeypatch.delenv("RANK", raising=False)
    assert script.main(argv) == 7
    ((command, count, logs),) = started
    assert (command[1:], count, logs.name) == ([str(SCRIPT), *argv], 2, "reference_rewards_1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert script.main(argv) == 2  # as a rank: four were started, not two
