"""An exported model is the base model's directory with other weights: complete, and true of what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny_models import make_config

TOKENIZER_CODE = (
    "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
)
MORE_FILES = {
    "tokenization_mine.py": TOKENIZER_CODE,
    "helper_of_mine.py": "X = 1\n",
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "generation_config.json": '{"eos_token_id": [1, 3]}',
    "vocab.bpe": "a b",
    "qwen.tiktoken": "YQ== 0",
    "NOTICE.txt": "of the authors",
}


@pytest.fixture(scope="module")
def base(tiny_models, tmp_path_factory) -> Path:
    """A bfloat16 model with tied embeddings and a copy of them, code, more templates, and a stale entry."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_models["qwen2_tied"], tmp_path_factory.mktemp("base") / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}, "made_by": "Ä"}
    (model / "config.json").write_text(json.dumps(config))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "additional_chat_templates").mkdir()
    for name, text in MORE_FILES.items():
        (model / name).write_text(text)
    return model


def _export(base, folder):
    """The model as a run exports it, and as it comes back from a Megatron directory."""
    from nemo_aapo.conversion.convert import checkpoint_to_hf, hf_to_megatron
    from nemo_aapo.conversion.source import find_source
    from tests.policies import make_policy

    make_policy(make_config(base)).export(str(folder / "of_a_run"))
    hf_to_megatron(base, folder / "megatron")
    checkpoint_to_hf(find_source(folder / "megatron"), folder / "converted")


@pytest.fixture(scope="module")
def exported(ranks, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    ranks.run(_export, base, folder)
    return folder


@pytest.mark.parametrize("name", ["of_a_run", "converted"])
def test_an_export_has_all_files_of_the_base_model_and_its_dtype(base, exported, name):
    from safetensors.torch import load_file

    directory = exported / name
    for file in MORE_FILES:
        assert (directory / file).read_text() == MORE_FILES[file]
    before, after = load_file(base / "model.safetensors"), load_file(directory / "model.safetensors")
    del before["lm_head.weight"]
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and before[key].equal(after[key]) for key in before)
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((directory / "config.json").read_text()) == config


@pytest.mark.parametrize("name", ["of_a_run", "converted"])
def test_transformers_loads_it_with_its_tokenizers_code(exported, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported / name, trust_remote_code=True)
    assert (type(tokenizer).__name__, set(tokenizer.chat_template)) == ("Mine", {"default", "tool_use"})
    assert str(AutoModelForCausalLM.from_pretrained(exported / name, dtype="auto").dtype) == "torch.bfloat16"
