"""What is wrong with tokenizer, chat template and end tokens is refused by every command; a run keeps its day."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest

from nemo_aapo.config import digests_of_run
from nemo_aapo.config.command_line import EVALUATION, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.conversion.source import ModelSource
from nemo_aapo.errors import ConfigError, DataError
from nemo_aapo.evaluation.records import claim_identity
from nemo_aapo.prepare.conversion import Layout, prepare_hf_to_megatron
from nemo_aapo.prepare.text import with_date, with_evaluation_date
from nemo_aapo.reference_store.key import store_key
from nemo_aapo.reference_store.shards import Shard
from nemo_aapo.reference_store.store import RewardStore
from nemo_aapo.run.directory import check_run_directory, claim
from nemo_aapo.run.identity import identity_of
from nemo_aapo.text import chat_template
from nemo_aapo.types import SamplingSpec
from tests.prepare.conftest import command
from tests.tiny_models import make_config, save_character_tokenizer, save_empty_model

ROWS = 100
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder)
    return folder


@pytest.fixture
def model(tokenizer, tmp_path) -> Path:
    """A model directory without tensors, with a tokenizer of 97 tokens."""
    directory = save_empty_model(tmp_path / "named", vocab_size=ROWS)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory


def of_model(model: Path, **changes):
    return make_config(model, **{"run__dir": str(model.parent / "run"), **changes})


@pytest.mark.parametrize("name", ["train", "launch", "fill", "serve", "evaluate"])
def test_each_command_refuses_ids_without_a_row_before_torch_is_imported(name, given, blocker, tokenizer, capsys):
    save_empty_model(given.folder / "model", vocab_size=90)
    shutil.copytree(tokenizer, given.folder / "model", dirs_exist_ok=True)
    model, train, validation, run_dir = given.words
    short = ["max_prompt_tokens=8", "sampling.max_new_tokens=8"]
    words = [model, run_dir, *short] if name == "evaluate" else [model, train, validation, run_dir]
    assert command(name)(words) == 2
    assert "has 97 tokens with ids up to 96, the model's vocabulary 90 rows" in capsys.readouterr().err
    assert not blocker.asked
    with pytest.raises(DataError, match="vocabulary 90 rows"):
        prepare_hf_to_megatron(given.folder / "model", given.folder / "out", Layout())


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("chat_template.jinja", "{% if %}", "chat_template.jinja: the chat template has a syntax error"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "chat_template.jinja: .* refuses the messages: no"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}', "none is called default"),
        ("tokenizer_config.json", '{"chat_template": "{{ 7 }}"}', "tokenizer_config.json: the chat template drops the"),
        (
            "tokenizer_config.json",
            '{"add_eos_token": true, "eos_token": "<eos>"}',
            "puts <eos> behind every",
        ),
        ("generation_config.json", '{"eos_token_id": [1, 100]}', "generation_config.json: eos_token_id names 100"),
    ],
)
def test_text_files_that_cannot_work_are_refused_by_name(model, file, content, said):
    with_date(of_model(model), ROWS)
    (model / file).write_text(content)
    with pytest.raises(DataError, match=said):
        with_date(of_model(model), ROWS)


def test_arguments_of_a_template_need_one_that_reads_them_and_decide_the_run(model):
    arguments = {"data__template_arguments": {"enable_thinking": False}}
    with pytest.raises(DataError, match="template_arguments has no effect"):
        with_date(of_model(model, **arguments), ROWS)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{{ enable_thinkin }}")
    with pytest.raises(DataError, match=r"reads no argument 'enable_thinking' \(did you mean 'enable_thinkin'"):
        with_date(of_model(model, **arguments), ROWS)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{{ enable_thinking }}")
    with_date(of_model(model, **arguments), ROWS)
    plain, argued = (of_model(model, **more) for more in ({}, arguments))
    assert not {*digests_of_run(plain, {})} & {*digests_of_run(argued, {})}
    key = store_key("m", SamplingSpec(1.0, 8, (1,)), [], 1)
    other = store_key("m", SamplingSpec(1.0, 8, (1,)), [], 1, template_arguments={"enable_thinking": False})
    assert other.differences(key.parts) == ["template_arguments.enable_thinking: not set there, false here"]


def day_of(config) -> str | None:
    return with_date(config, ROWS).data.date


def test_a_run_takes_the_day_of_its_first_start_and_one_without_dates_has_none(model, monkeypatch):
    monkeypatch.setattr(chat_template, "today", lambda: "2025-01-31")
    assert day_of(of_model(model)) is None
    (model / "chat_template.jinja").write_text(DATED)
    assert day_of(of_model(model, data__chat_template="none")) is None
    begun = with_date(of_model(model), ROWS)
    assert begun.data.date == "2025-01-31"
    claim(begun, {}, 1)[0].close()
    (Path(begun.run.dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    monkeypatch.setattr(chat_template, "today", lambda: "2025-02-01")
    assert with_date(of_model(model), ROWS) == begun
    check_run_directory(begun)
    assert day_of(of_model(model, run__dir=str(model.parent / "other"))) == "2025-02-01"
    with pytest.raises(ConfigError, match=r'data\.date: "2025-01-31" there, "2025-02-01" now'):
        check_run_directory(with_date(of_model(model, data__date="2025-02-01"), ROWS))


@pytest.mark.parametrize("date", ["yesterday", "20250131", "2025-02-30", ""])
def test_a_day_that_is_none_is_refused(date):
    with pytest.raises(ConfigError, match=r"data\.date=.*a day is needed, as 2025-01-31"):
        make_config("/m", data__date=date)


@pytest.mark.parametrize("shard", [None, Shard(1, 4)])
def test_a_run_takes_the_day_that_its_store_was_filled_on(model, monkeypatch, shard):
    (model / "chat_template.jinja").write_text(DATED)
    store = str(model.parent / "store.sqlite")
    monkeypatch.setattr(chat_template, "today", lambda: "2025-02-01")
    config = of_model(model, algorithm__reference_store=store)
    assert day_of(config) == "2025-02-01"
    key = store_key("m", SamplingSpec(1.0, 8, (1,)), [], 1, date="2025-01-31")
    with contextlib.closing(RewardStore(shard.path(store) if shard else store, key)) as opened:
        opened.write({"prompt": [0.0]})
    assert day_of(config) == "2025-01-31"
    assert day_of(dataclasses.replace(config, data=dataclasses.replace(config.data, date="2024-12-24"))) == "2024-12-24"


def test_an_evaluation_takes_the_day_of_the_run_that_it_measures_or_of_its_own_first_start(model, monkeypatch):
    (model / "chat_template.jinja").write_text(DATED)
    words = [f"model.path={model}", f"run.dir={model.parent / 'evaluation'}"]
    config = EVALUATION.parse(compose(read_command_line(words, EVALUATION)))
    own, of_run = (ModelSource("hf", model, model, run) for run in (None, model.parent / "run"))
    monkeypatch.setattr(chat_template, "today", lambda: "2025-01-31")
    claim(with_date(of_model(model), ROWS), {}, 1)[0].close()
    monkeypatch.setattr(chat_template, "today", lambda: "2025-02-01")
    assert with_evaluation_date(config, of_run, ROWS).date == "2025-01-31"
    begun = with_evaluation_date(config, own, ROWS)
    assert begun.date == "2025-02-01"
    Path(config.run.dir).mkdir()
    claim_identity(Path(config.run.dir), {"date": begun.date})
    monkeypatch.setattr(chat_template, "today", lambda: "2025-02-02")
    assert with_evaluation_date(config, own, ROWS) == begun
    assert with_evaluation_date(dataclasses.replace(config, date="2024-12-24"), own, ROWS).date == "2024-12-24"


def test_other_end_tokens_are_another_run_and_runs_from_before_they_counted_go_on(model):
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    config = of_model(model)
    claim(config, {}, 1)[0].close()
    (Path(config.run.dir) / "metrics.jsonl").write_text('{"step": 0}\n')
    check_run_directory(config)
    before = identity_of(config)
    (model / "generation_config.json").write_text('{"eos_token_id": [1]}')
    with pytest.raises(ConfigError, match=r'model.end_tokens: \["<eos>", \[1, 5\]\] there, \["<eos>", \[1\]\] now'):
        check_run_directory(config)
    older = {name: value for name, value in before.items() if name != "model.end_tokens"}
    assert digests_of_run(config, older)[0] in digests_of_run(config, identity_of(config))
