"""Conversion: every byte survives the way there and back on any layout, and transformers computes the same."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoint_runs import make_checkpointer, make_policy, state_of, train, weights
from tests.tiny_models import SIZES, make_config, save_character_tokenizer, save_model

LAYOUTS = {"1x1": (1, 1, 1), "2x1": (2, 2, 1), "1x2": (2, 1, 2), "2x2": (4, 2, 2)}


@pytest.fixture(scope="module")
def more_models(tmp_path_factory, tiny_models) -> dict[str, Path]:
    """Tiny models of all families that convert; those that train, and further ones, in dtypes of their own."""
    from transformers import GemmaConfig, LlamaConfig, MistralConfig

    folder = tmp_path_factory.mktemp("more_models")
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    large = {**SIZES, "max_position_embeddings": 131072}
    made = dict(tiny_models)
    for name, config, dtype in (
        ("llama3", LlamaConfig(**large, rope_scaling=llama3, rope_theta=5e5, tie_word_embeddings=True), "bfloat16"),
        ("mistral", MistralConfig(**SIZES, sliding_window=8, tie_word_embeddings=False), "bfloat16"),
        ("gemma", GemmaConfig(**{**SIZES, "num_key_value_heads": 2}, head_dim=32), "float16"),
    ):
        made[name] = folder / name
        save_model(config, made[name])
        _cast(made[name], getattr(torch, dtype))
        save_character_tokenizer(made[name])
        (made[name] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return made


def _cast(directory: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)


def convert_there_and_back(path, folder):
    """A model as ``folder/megatron``, and from there in shards as ``folder/back``."""
    from nemo_aapo.conversion.convert import checkpoint_to_hf, hf_to_megatron
    from nemo_aapo.conversion.source import find_source

    hf_to_megatron(path, folder / "megatron")
    checkpoint_to_hf(find_source(folder / "megatron"), folder / "back", max_shard_bytes=60_000)


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3", "qwen3_moe", "llama", "llama3", "mistral", "gemma"])
def test_every_byte_survives_the_way_to_megatron_and_back(ranks, more_models, tmp_path, name):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    layout = {"ep": 2} if name == "qwen3_moe" else {"tp": 2}
    ranks.run(convert_there_and_back, more_models[name], tmp_path, world=2, **layout)
    back = tmp_path / "back"
    before = load_file(more_models[name] / "model.safetensors")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = {file: load_file(back / file) for file in set(index["weight_map"].values())}
    after = {key: files[file][key] for key, file in index["weight_map"].items()}
    assert len(files) > 2
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    for file in more_models[name].iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (more_models[name], back)]
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():  # not to the bit: kernels go by where in a file, and so in memory, a weight lies
        torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(back)("x + 1")["input_ids"]


@pytest.fixture(scope="module")
def run(ranks, tiny_models, tmp_path_factory):
    """A run directory with checkpoints of steps 2 and 3, saved under TP 2 x PP 2; and the weights at step 3."""
    directory = tmp_path_factory.mktemp("run") / "math7b"
    directory.mkdir()
    config = dataclasses.asdict(make_config(tiny_models["qwen2"], train="gsm8k.jsonl", run__name="math7b"))
    (directory / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    lines = [{"step": step, "validation/accuracy_greedy": step / 10} for step in (0, 2, 4)]
    lines += [{"step": 3, "loss": 1.0, "reward/mean": 0.125, "completion_length/mean": 7.0}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = ranks.run(_train_and_save, tiny_models["qwen2"], directory / "checkpoints", world=4, tp=2, pp=2)
    return directory, made[0]


def _train_and_save(model, directory):
    policy = make_policy(model, 2, 2)
    checkpoints = make_checkpointer(directory)
    for step in (1, 2, 3):
        train(policy, step)
        if step > 1:
            checkpoints.save(step, policy, state_of(step))
    return weights(policy)


def _export(path, target, dtype=None):
    from nemo_aapo.conversion.convert import checkpoint_to_hf
    from nemo_aapo.conversion.source import find_source

    said = []
    return checkpoint_to_hf(find_source(path), target, dtype=dtype, log=said.append).step, said


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_runs_checkpoint_is_exported_on_any_layout_without_its_optimizer(ranks, run, tmp_path, layout):
    from safetensors.torch import load_file

    directory, trained = run
    world, tp, pp = LAYOUTS[layout]
    assert ranks.run(_export, directory, tmp_path / "hf", world=world, tp=tp, pp=pp)[0] == (3, [])
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all((exported[name].numpy() == trained[name]).all() for name in trained)


@pytest.mark.once
def test_the_model_card_names_base_model_algorithm_data_and_metrics_of_the_step(ranks, run, tmp_path):
    ranks.run(_export, run[0] / "checkpoints" / "step_000003", tmp_path / "hf", torch.bfloat16)
    card = (tmp_path / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["tags"]) == ("qwen2", ["nemo_aapo", "aapo"])
    assert "trained for 3 steps with AAPO" in card
    assert "`gsm8k.jsonl`" in card
    assert "| accuracy, greedy | 0.000 | 0.200 |" in card  # not the validation of step 4
    assert "reward/mean 0.125" in card
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def _export_while_it_is_pruned(directory, target):
    """The trainer saves step 4 and removes 2 and 3 once their manifests were read."""
    from nemo_aapo.checkpoint import manifest
    from nemo_aapo.distributed import parallel

    read, removed = manifest.read, []

    def read_and_prune(path):
        content = read(path)
        if not removed and parallel.rank() == 0:
            removed.append(path.name)
            shutil.copytree(path, directory / "checkpoints" / "step_000004")
            for step in (2, 3):
                shutil.rmtree(directory / "checkpoints" / f"step_00000{step}")
        return content

    manifest.read = read_and_prune
    try:
        return *_export(directory, target), removed
    finally:
        manifest.read = read


@pytest.mark.once
def test_a_checkpoint_that_is_removed_while_it_is_read_is_left_for_the_newest(ranks, run, tmp_path):
    directory, trained = tmp_path / "run", run[1]
    shutil.copytree(run[0], directory)
    step, said, removed = ranks.run(_export_while_it_is_pruned, directory, tmp_path / "hf", world=2, tp=2)[0]
    assert (step, said, removed) == (3, [], ["step_000003"])  # the copy's manifest says 3
    from safetensors.torch import load_file

    assert (
        load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"].numpy() == trained["lm_head.weight"]
    ).all()


def _errors(path, target):
    from nemo_aapo.conversion.source import find_source
    from tests.checkpoint_runs import error_of

    return error_of(lambda: _export(path, target)), find_source(path).candidates()


@pytest.mark.once
def test_of_a_crashed_run_the_newest_whole_checkpoint_is_taken_and_the_damage_named(ranks, run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(run[0], directory)
    newest = directory / "checkpoints" / "step_000003"
    (newest / "__3_0.distcp").write_bytes(b"half")
    (directory / "checkpoints" / ".step_000004.partial").mkdir()
    step, said = ranks.run(_export, directory, tmp_path / "hf", world=2, tp=2)[0]
    assert step == 2
    assert "took step_000002" in said[0]
    assert "__3_0.distcp has 4 bytes" in said[0]
    for path in (newest, directory):  # an explicit one is not exchanged for another
        if path == directory:
            (directory / "checkpoints" / "step_000002" / "common.pt").unlink()
        for error, _ in ranks.run(_errors, path, tmp_path / "other", world=2, tp=2):
            assert "__3_0.distcp has 4 bytes" in error
    assert not (tmp_path / "other").exists()
    assert sorted(p.name for p in (directory / "checkpoints").iterdir())[1:] == ["step_000002", "step_000003"]


def _inspected(directory):
    """What is said of a run whose newest checkpoint has one small file cut off, by the file."""
    from nemo_aapo.cli.convert import main

    said = {}
    checkpoint = directory / "checkpoints" / "step_000003"
    for name in (".metadata", "common.pt", "metadata.json"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            said[name] = main(["inspect", str(directory)]), printed.getvalue()
        (checkpoint / name).write_bytes(whole)
    return said


def test_inspect_says_what_of_a_checkpoint_is_damaged(ranks, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    [said] = ranks.run(_inspected, tmp_path / "run")
    for name, (code, text) in said.items():
        assert code == 0
        assert f"DAMAGED: {name}\n" in text
    assert "header               can't be read" in said[".metadata"][1]
    assert "numbers in" in said["metadata.json"][1]


def _verify(source, directory):
    from nemo_aapo.conversion.source import find_source
    from nemo_aapo.conversion.verify import verify

    return verify(find_source(source), Path(directory), ["1 + 1 = ?", "x", "What is 17 times 23? Think first."])


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "qwen3_moe", "llama3", "mistral", "gemma"])
def test_megatron_computes_what_transformers_computes(ranks, more_models, name):
    [verdict, *others] = ranks.run(_verify, more_models[name], more_models[name], world=2, pp=2)
    assert verdict.ok(1e-4), verdict
    assert verdict.prompts == 3
    assert verdict.tokens > 40  # more than Mistral's window
    assert verdict.same_choice == 1.0
    assert others == [None]


def test_verify_finds_one_changed_number(ranks, more_models, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("qwen3", "mistral"):
        shutil.copytree(more_models[name], tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        [verdict] = ranks.run(_verify_changed, more_models[name], tmp_path / name, tmp_path / f"{name}_megatron")
        assert verdict.different == ("model.layers.1.mlp.up_proj.weight",)
        assert not verdict.ok(1.0)


def _verdict_of_nan(directory):
    """Of exact logits of three prompts, but for one that is NaN in the second."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from nemo_aapo.conversion.verify import Verdict, _distances

    prompts = [np.arange(2, end) for end in (5, 9, 7)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [model(torch.as_tensor(ids)[None]).logits[0] for ids in prompts]
    verdicts = [Verdict(1, (), 3, 14, *_distances(directory, prompts, logits))]
    logits[1][2, 3] = torch.nan
    return [*verdicts, Verdict(1, (), 3, 14, *_distances(directory, prompts, logits))]


def test_verify_does_not_pass_logits_that_are_nan_in_any_prompt(ranks, more_models):
    [[right, wrong]] = ranks.run(_verdict_of_nan, more_models["qwen3"])
    assert right.ok(1e-4)
    assert not wrong.ok(1e9)


def _verify_changed(before, after, megatron):
    from nemo_aapo.conversion.convert import hf_to_megatron

    hf_to_megatron(before, megatron)
    return _verify(megatron, after)
