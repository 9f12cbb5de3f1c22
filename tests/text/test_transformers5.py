"""Directories as transformers 5 writes them are the models that they were, wherever 4.57 has words for it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo import lines
from nemo_aapo.data.tokenizer import load_tokenizer
from nemo_aapo.errors import ConfigError
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.text.transformers5 import readable_directory, said, translation

LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def edit(path: Path, leave_out=(), **values) -> None:
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**{key: value for key, value in old.items() if key not in leave_out}, **values}))


@pytest.fixture
def written(tiny_models, tmp_path):
    """A tiny model as 4.57 writes it, with these settings, and as transformers 5.24 does."""

    def write(name: str, theta: float, scaling: dict | None = None) -> tuple[Path, Path]:
        old, new = (shutil.copytree(tiny_models[name], tmp_path / version) for version in ("old", "new"))
        edit(old / "config.json", ("rope_parameters",), rope_theta=theta, rope_scaling=scaling)
        rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
        edit(new / "config.json", ("rope_theta", "rope_scaling"), rope_parameters=rope, transformers_version="5.24.0")
        (new / "special_tokens_map.json").unlink(missing_ok=True)
        extra = {"extra_special_tokens": ["a", "<eos>"], "backend": "tokenizers", "is_local": True}
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["a", "<eos>"]}
        edit(old / "tokenizer_config.json", ("backend",), **named)
        (old / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["a", "<eos>"]})
        )
        dropped = ("added_tokens_decoder",)
        edit(new / "tokenizer_config.json", dropped, tokenizer_class="TokenizersBackend", **extra)
        return old, new

    return write


def _logits_and_export(old, new, export):
    """Largest distance of the two models' logits."""
    import torch

    from nemo_aapo.conversion import megatron_model
    from nemo_aapo.conversion.verify import _logits

    found = []
    for path in (old, new):
        weight_map, module = megatron_model.build(path, torch.float32)
        weight_map.load(module)
        found.append(_logits(module, np.arange(2, 60)))
    weight_map.save(module, export)
    return float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize(
    ("name", "theta", "scaling"), [("qwen3", 1e6, None), ("llama", 5e5, {"rope_type": "llama3", **LLAMA3})]
)
def test_it_is_the_same_model_and_is_exported_as_it_was_written(ranks, written, tmp_path, name, theta, scaling):
    old, new = written(name, theta, scaling)
    assert read_model_dir(str(old)) == read_model_dir(str(new))
    assert ranks.run(_logits_and_export, old, new, tmp_path / "export") == [0.0]
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "export" / file).read_bytes() == (new / file).read_bytes()
    assert said(old) == ""
    told = f"written by transformers 5 and read with rope_theta={theta}"
    assert told in said(new) if lines.installed() is lines.TRTLLM else said(new) == ""


def test_a_mixture_has_as_many_experts_whatever_they_are_called(tiny_models, tmp_path):
    """4.57 would take its default of 128 for a size that it does not find."""
    new = shutil.copytree(tiny_models["qwen3_moe"], tmp_path / "new")
    experts = json.loads((new / "config.json").read_text())["num_experts"]
    edit(new / "config.json", ("num_experts",), num_local_experts=experts, transformers_version="5.12.1")
    assert read_model_dir(new) == read_model_dir(tiny_models["qwen3_moe"])
    assert read_model_dir(new).experts.count == experts


def test_its_tokenizer_gives_the_same_tokens_in_silence(written):
    old, new = written("qwen2", 1e4)
    with warnings_of_transformers() as said:
        loaded = [load_tokenizer(str(path)) for path in (old, new)]
    assert not said
    texts = ["1 + 2 = 3<eos>", "abc"]
    assert loaded[0](texts)["input_ids"] == loaded[1](texts)["input_ids"]
    assert len({tuple(sorted(tokenizer.all_special_tokens)) for tokenizer in loaded}) == 1
    assert len({(tokenizer.eos_token_id, tokenizer.pad_token_id) for tokenizer in loaded}) == 1


def test_who_reads_by_himself_is_given_a_directory_in_the_words_of_4_57(written):
    from transformers import AutoConfig

    old, new = written("llama", 5e5, {"rope_type": "llama3", **LLAMA3})
    with readable_directory(new) as links:
        ours, theirs = (AutoConfig.from_pretrained(path).to_diff_dict() for path in (links, old))
        assert ours == {**theirs, "transformers_version": ours["transformers_version"]}
        assert (links / "model.safetensors").read_bytes() == (new / "model.safetensors").read_bytes()
    assert not links.exists()
    assert "rope_parameters" in (new / "config.json").read_text()
    with readable_directory(old) as same:
        assert same == old


@pytest.mark.parametrize(
    ("config", "translated"),
    [
        ({}, {}),
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {"rope_theta": 1e4, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 1e4, "rope_scaling": None}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", **LLAMA3}, "rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
            {"partial_rotary_factor": 1.0, "rope_scaling": None},
        ),
    ],
)
def test_rope_parameters_are_said_in_the_words_of_4_57(tiny_models, tmp_path, config, translated):
    assert translation(config) == translated
    model = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    edit(model / "config.json", ("rope_theta", "rope_scaling", "rope_parameters"), **config)
    assert read_model_dir(str(model)).num_layers == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type yarn gets lost"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "type linear gets lost"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "factor gets lost",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between kinds of layers"),
        ({"rope_parameters": "default"}, "differ between kinds of layers"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_parameters and rope_theta contradict"),
        (
            {"rope_parameters": {}, "rope_scaling": {"rope_type": "linear"}},
            "and rope_scaling contradict",
        ),
    ],
)
def test_what_4_57_cannot_say_or_megatron_computes_otherwise_is_refused(tiny_models, tmp_path, config, message):
    model = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    edit(model / "config.json", ("rope_theta", "rope_scaling", "rope_parameters"), **config)
    with pytest.raises(ConfigError, match=message):
        read_model_dir(str(model))


@pytest.mark.parametrize(("version", "model_type"), [("4.57.6", "qwen2"), ("4.57.3", "llama"), (None, None)])
def test_the_false_alarm_about_a_regex_is_not_given_and_the_true_one_is(tiny_models, tmp_path, version, model_type):
    model = shutil.copytree(tiny_models["qwen2"], tmp_path / "model")
    whole = json.loads((model / "tokenizer.json").read_text())
    whole["model"]["vocab"] |= {f"word {n}": 1000 + n for n in range(100_001)}  # smaller ones are not looked at
    (model / "tokenizer.json").write_text(json.dumps(whole))
    edit(model / "config.json", transformers_version=version, model_type=model_type)
    with warnings_of_transformers() as said:
        tokenizer = load_tokenizer(str(model))
    assert not said
    edit(model / "config.json", transformers_version="4.57.6", model_type="mistral")
    with warnings_of_transformers() as said:
        other = load_tokenizer(str(model))
    assert ["fix_mistral_regex" in text for text in said] == [True]
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()  # and it is not obeyed


class warnings_of_transformers(logging.Handler):
    """Inside, a list of what it has warned of as it loaded a tokenizer."""

    loggers = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")

    def __enter__(self) -> list[str]:
        self.said: list[str] = []
        for name in self.loggers:
            logging.getLogger(name).addHandler(self)
        return self.said

    def __exit__(self, *error: object) -> None:
        for name in self.loggers:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
