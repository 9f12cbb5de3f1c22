"""What ends a completion, what of it is text, and which tokenizers fit a model: by the files beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from nemo_aapo.data.tokenizer import load_text, load_tokenizer, render_prompts
from nemo_aapo.errors import DataError
from nemo_aapo.prepare.text import check_tokenizer
from nemo_aapo.text.end_tokens import end_tokens, what_ends
from nemo_aapo.text.files import appended_token, check_vocabulary, token_ids
from tests.tiny_models import save_character_tokenizer

ROWS = 160


def change(path: Path, **settings) -> None:
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, **settings}))


@pytest.fixture
def model(tmp_path) -> Path:
    """A tokenizer whose end is 1, padding 0, tags from 97 on, beside a config.json."""
    save_character_tokenizer(tmp_path, ["<answer>", "</answer>", "<end>"])
    change(tmp_path / "config.json", eos_token_id=1)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        ({}, (1,)),
        ({"eos_token_id": None}, (1,)),
        ({"eos_token_id": 1}, (1,)),
        ({"eos_token_id": 99}, (1, 99)),
        ({"eos_token_id": [99, 1, 98, 99]}, (1, 98, 99)),
        ({"eos_token_id": [99, 0], "pad_token_id": 0}, (1, 0, 99)),  # Qwen's <|endoftext|> pads and ends
    ],
)
def test_the_tokenizers_end_and_all_that_the_generation_config_names_end_a_completion(model, named, ends):
    change(model / "generation_config.json", **named)
    assert end_tokens(model, 1, ROWS) == ends
    assert load_text(str(model), ROWS).end_tokens == ends


def test_without_a_generation_config_the_models_own_config_is_asked(model):
    change(model / "config.json", eos_token_id=[99])
    assert end_tokens(model, 1, ROWS) == (1, 99)
    assert end_tokens(model, None, ROWS) == (99,)
    change(model / "config.json", eos_token_id=None)
    with pytest.raises(DataError, match="no end-of-sequence token and generation_config"):
        end_tokens(model, None, ROWS)


@pytest.mark.parametrize("named", [160, [1, 160], -1, "1", [True], {"a": 1}, 1.0])
def test_ids_that_the_model_cannot_generate_are_refused_by_file(model, named):
    change(model / "generation_config.json", eos_token_id=named)
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id"):
        end_tokens(model, 1, ROWS)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize("left", ['{"eos_token_id": [1, 99]', '["<eos>"]', ""])
def test_a_half_written_file_is_refused_and_does_not_end_completions_elsewhere(model, name, left):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]  # without it special_tokens_map.json counts
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / name).write_text(left)
    with pytest.raises(DataError, match=rf"{name}: damaged .*Half-written"):
        what_ends(model)
    with pytest.raises(DataError, match=rf"{name}: damaged .*Half-written"):
        check_tokenizer(model, ROWS)


def test_only_what_ended_the_completion_and_padding_are_no_text(model):
    change(model / "generation_config.json", eos_token_id=[1, 99])
    text = load_text(str(model), ROWS)

    def decoded(*tokens: str) -> str:
        return text.decode(np.array(text.tokenizer.convert_tokens_to_ids(list(tokens)), dtype=np.int32))

    assert decoded("<answer>", "7", " ", "</answer>", "<eos>") == "<answer>7 </answer>"
    assert decoded("<answer>", "7", "</answer>", "<end>") == "<answer>7</answer>"
    assert decoded("7", "<pad>", "8", "</answer>") == "78</answer>"
    assert decoded("7", "<end>", "8") == "7<end>8"
    assert decoded("<eos>") == decoded() == ""
    assert str(text) == "<eos> (1), <end> (99)"


def test_a_tokenizer_that_gives_ids_without_a_row_is_refused_and_padding_is_not_asked_for(model):
    assert token_ids(model) == load_tokenizer(str(model)).get_vocab()
    check_vocabulary(model, 100)
    check_vocabulary(model, 1000)  # rows without a token are common
    said = r"100 tokens with ids up to 99, the model's vocabulary 99 rows: there is none for '<end>' \(99\)"
    with pytest.raises(DataError, match=said):
        check_vocabulary(model, 99)
    with pytest.raises(DataError, match=said):
        load_text(str(model), 99)
    change(model / "tokenizer_config.json", pad_token="<end>")  # of a tokenizer that was given padding later
    check_vocabulary(model, 99)
    assert load_text(str(model), 99).end_tokens == (1,)


def test_a_tokenizer_that_ends_plain_prompts_by_itself_is_refused(model):
    assert appended_token(model) is None
    tokenizer = load_tokenizer(str(model))
    tags = [("<answer>", 97), ("<eos>", 1)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<answer> $A <eos>", special_tokens=tags)
    tokenizer.save_pretrained(model)
    assert appended_token(model) == "<eos>"
    with pytest.raises(DataError, match="puts <eos> behind every plain text"):
        render_prompts(load_tokenizer(str(model)), ["1+1="])
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<answer> $A", special_tokens=tags)
    tokenizer.save_pretrained(model)
    assert appended_token(model) is None
    assert render_prompts(load_tokenizer(str(model)), ["1="])[1][0].tolist() == [97, 19, 31]
    change(model / "tokenizer_config.json", add_eos_token=True)
    assert appended_token(model) == "<eos>"
