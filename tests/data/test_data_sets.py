"""Data sets of every format and form: the same prompts come out, and what can't be used is said in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from nemo_aapo import load_config
from nemo_aapo.config.sources import Source, sources_of
from nemo_aapo.data.contamination import normalise
from nemo_aapo.data.prompts import load_prompts
from nemo_aapo.data.records import Record
from nemo_aapo.data.rows import TRAIN_SPLITS, gold_answer, lookup, parse_row, read_rows
from nemo_aapo.errors import DataError
from tests.tiny_models import make_config

PRESETS = Path(__file__).parents[2] / "conf" / "data"
ROWS = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(20)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


# ---------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The same rows in every format, by name."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("copies")
    table = pyarrow.Table.from_pylist(ROWS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    parquet.write_table(table, folder / "rows.parquet", row_group_size=7)
    with pyarrow.OSFile(str(folder / "file.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    data = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_list(ROWS[:3])
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": data, "test": other}).save_to_disk(folder / "saved_splits")
    (folder / "copy" / "data").mkdir(parents=True)
    parquet.write_table(table, folder / "copy" / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(table.slice(0, 3), folder / "copy" / "data" / "test-00000-of-00001.parquet")
    return folder


FORMATS = ("rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "file.arrow", "saved", "saved_splits", "copy")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(copies, tokenizer, name):
    wanted = load_prompts(copies / "rows.jsonl", tokenizer, max_prompt_tokens=40)
    loaded = load_prompts(copies / name, tokenizer, max_prompt_tokens=40)
    assert loaded.digest == wanted.digest
    assert loaded.questions == wanted.questions == tuple(row["question"] for row in ROWS)
    assert [p.source.rpartition(":")[2] for p in loaded.prompts][:3] in (["1", "2", "3"], ["2", "6", "10"])


@pytest.mark.parametrize("name", ["saved_splits", "copy"])
def test_splits_are_chosen_by_use_or_by_name(copies, tokenizer, name):
    def count(**options):
        return len(load_prompts(copies / name, tokenizer, max_prompt_tokens=40, **options).prompts)

    assert count() == 20
    assert count(default_splits=("test", "validation")) == 3
    assert count(split="test") == 3
    with pytest.raises(DataError, match=r"there is no split dev; there is train, test: name one, as in \[\{path: "):
        count(split="dev")


def test_what_cant_be_read_is_named_with_the_remedy(copies, tokenizer, tmp_path, monkeypatch):
    def load(path, **options):
        return load_prompts(path, tokenizer, max_prompt_tokens=40, **options)

    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.arrow").write_bytes(b"no")
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_info.json").write_text("{")
    for path, options, message in [
        (tmp_path / "bad.parquet", {}, "not a Parquet file that can be read"),
        (tmp_path / "bad.arrow", {}, "not an Arrow file that can be read"),
        (tmp_path / "bad.json", {}, "not JSON"),
        (tmp_path / "broken", {}, "not a saved data set that can be loaded"),
        (copies / "rows.jsonl", {"split": "train"}, "this is one file, split=train has no effect"),
        (copies / "saved", {"subset": "main"}, "a saved data set has no subsets"),
        (copies / "rows.parquet", {"answer_field": "anser"}, 'the key "anser" is missing; did you mean "answer"'),
        ("openai/no_such_data", {}, r"openai/no_such_data: no such file here, and as a data set of the .* hub"),
    ]:
        with pytest.raises(DataError, match=message):
            load(path, **options)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs the package pyarrow: pip install pyarrow"):
        load(copies / "rows.parquet")


# ---------------------------------------------------------------- forms

REAL_FORMS = {
    "gsm8k": ({"question": "Q 1?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"}, "Q 1?", "1002"),
    "math": (
        {
            "problem": "Q?",
            "level": "Level 5",
            "type": "Algebra",
            "solution": "So \\boxed{1} or $\\boxed{\\frac{1}{2}}$.",
        },
        "Q?",
        "1, \\frac{1}{2}",
    ),
    "simplelr_level3to5_qwen": (
        {
            "gt_answer": "\\frac{3}{4}",
            "subject": "Algebra",
            "level": 3,
            "question": "Q?",
            "prompt": [{"role": "user", "content": "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"}],
            "reward_model": {"ground_truth": "\\frac{3}{4}", "style": "rule"},
        },
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
        "\\frac{3}{4}",
    ),
    "simplelr_level3to5_abel": (
        {"gt_answer": "7", "question": "Q?", "prompt": [{"role": "user", "content": "Question:\nQ?\nAnswer:\n"}]},
        "Question:\nQ?\nAnswer:\n",
        "7",
    ),
    "open_rs": ({"problem": "Q?", "solution": "so 7", "answer": "7", "level": "Hard"}, "Q?", "7"),
    "deepscaler": ({"problem": "Q?", "answer": "-\\frac{2}{3}", "solution": ""}, "Q?", "-\\frac{2}{3}"),
    "dapo_math": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": "Solve ... Answer: $Answer\n\nQ?", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "Solve ... Answer: $Answer\n\nQ?",
        "34",
    ),
    "orz": ([{"from": "human", "value": "Q?"}, {"from": "assistant", "ground_truth": {"value": "12"}}], "Q?", "12"),
    "jsonl": ({"question": "Q?", "answer": 7}, "Q?", "7"),
}
"""Preset -> a row of the data set's form, and the question and answer in it."""


def test_every_preset_is_tested_on_a_row_of_its_real_form_and_is_valid():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(REAL_FORMS)
    for name, (row, question, answer) in REAL_FORMS.items():
        page = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        config = make_config("model", **{f"data__{key}": value for key, value in page.items()})
        source = sources_of(config.data, "train")[0]
        parsed = parse_row(Record(1, row), source)
        assert (parsed.question, parsed.answer, parsed.before) == (question, answer, ()), name


def test_a_presets_place_can_be_replaced_by_a_copy_whose_fields_stay_the_same():
    for name in REAL_FORMS:
        words = ["model.path=m", "data.train=copy.jsonl", "data.validation=[{path: held_out.jsonl, answer_field: a}]"]
        data = load_config([f"data={name}", *words]).data
        page = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        fields = {key: page[key] for key in ("prompt_field", "answer_field", "answer_form") if key in page}
        assert sources_of(data, "train") == (Source("copy.jsonl", **fields),), name
        assert sources_of(data, "validation") == (Source("held_out.jsonl", **{**fields, "answer_field": "a"}),), name


def test_orzs_array_is_read_whole(tmp_path, tokenizer):
    (tmp_path / "orz.json").write_text(json.dumps([REAL_FORMS["orz"][0]] * 2 + [[{"from": "human", "value": "P?"}]]))
    rows, problems = read_rows(Source(str(tmp_path / "orz.json"), "0.value", "1.ground_truth.value"), TRAIN_SPLITS)
    assert [row.question for row in rows] == ["Q?", "Q?"]
    assert problems == {
        3: "no answer: the key \"1.ground_truth.value\" is missing; there is '0' (set data.answer_field)"
    }


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("\\boxed{1}, no: \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} or $\\boxed{2}$", "1, 2"),  # one answer of two parts, as the verifiers read a completion
        ("\\boxed 7", "7"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\fbox{ 7 }", "7"),
        ("so \\boxed{a\\}b}", "a\\}b"),
    ],
)
def test_a_boxed_answer_is_that_of_the_last_box(solution, gold):
    assert gold_answer(solution, "boxed") == gold


@pytest.mark.parametrize("solution", ["no box", "\\boxed{1", "\\boxed{ }"])
def test_a_solution_without_a_whole_box_is_no_answer(solution):
    with pytest.raises(DataError, match="no answer: the worked solution"):
        gold_answer(solution, "boxed")


def test_dots_lead_inside_and_a_name_with_dots_comes_first():
    row = {"a": {"b": [{"c": 1}, 2]}, "a.b": "whole", "n": None}
    assert lookup(row, "a.b") == "whole"
    assert lookup({"a": {"b": [{"c": 1}, 2]}}, "a.b.0.c") == 1
    assert lookup({"a": {"b": [{"c": 1}, 2]}}, "a.b.-1") == 2
    assert lookup(row, "n") is None
    for path in ("a.b.2", "n.x", "x", "a.b.c", "a.", ""):
        assert repr(lookup({"a": {"b": [1]}, "n": None}, path)).startswith("<object"), path


# ---------------------------------------------------------------- rendering


def test_chat_messages_are_rendered_with_what_comes_before_the_question(write, tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    path = write("chat.jsonl", [{"question": [*chat, {"from": "human", "value": "C"}], "answer": "1"}])
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        loaded = load_prompts(path, tokenizer, max_prompt_tokens=99, prompt_template="{question}!")
        assert loaded.prompts[0].text == "<system>S<user>A<assistant>B<user>C!<a>"
        assert loaded.questions == ("C",)
        with pytest.raises(DataError, match="bring a system message of their own"):
            load_prompts(path, tokenizer, max_prompt_tokens=99, system_prompt="T")
    finally:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match="several chat messages, which only a chat template can render"):
        load_prompts(path, tokenizer, max_prompt_tokens=99)
    bad = write("bad.jsonl", [{"question": chat, "answer": "1"}])
    with pytest.raises(DataError, match='the last message of "question" is the assistant\'s'):
        load_prompts(bad, tokenizer, max_prompt_tokens=99)


def test_a_plain_template_holds_system_prompt_and_question(write, tokenizer):
    path = write("rows.jsonl", [{"question": "1+1? {system_prompt}", "answer": "2"}])

    def text(**options):
        return load_prompts(path, tokenizer, max_prompt_tokens=99, **options).prompts[0].text

    template = "{system_prompt} Q: {question} A:"
    assert text(system_prompt="Hi {question}.", prompt_template=template).startswith("Hi ")
    assert text(system_prompt="Hi.", prompt_template=template) == "Hi. Q: 1+1? {system_prompt} A:"
    with pytest.raises(DataError, match=r"write \{system_prompt\} into prompt_template"):
        text(system_prompt="Hi.")
    with pytest.raises(DataError, match="but system_prompt is not set"):
        text(prompt_template=template)


# ---------------------------------------------------------------- hostile input


def mutate(line: bytes, rng: random.Random) -> bytes:
    """A few bytes, a piece of another kind, or a nested value in place of some of the line."""
    content = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([0, 1, 1, 2, 8, 40]))
        pieces = [
            b"",
            b"\x00",
            b"\xff\xfe",
            b"\\ud800",
            b'"',
            b"{",
            b"[" * 2000,
            b"]}",
            b"null",
            b"1e999",
            b"NaN",
            b"-0",
        ]
        pieces += [
            bytes([rng.randrange(256)]),
            b"#### ",
            b"\\boxed{",
            b'": {"role": "user"}',
            "é\u202e".encode(),
            b"9" * 5000,
        ]
        content[start:end] = rng.choice(pieces)
    return bytes(content)


def test_ten_thousand_mutated_lines_give_rows_or_reasons_and_no_crash(tmp_path):
    rng = random.Random(7)
    seeds = [json.dumps(row).encode() for row, _, _ in REAL_FORMS.values()] + [b'{"question": "a", "answer": 1}']
    lines = [mutate(rng.choice(seeds), rng).replace(b"\n", b" ") for _ in range(10_000)]
    (tmp_path / "mutated.jsonl").write_bytes(b"\n".join(lines))
    counts = set()
    for fields in (
        ("question", "answer", "auto"),
        ("problem", "solution", "boxed"),
        ("prompt", "reward_model.ground_truth", "auto"),
        ("0.value", "1.ground_truth.value", "auto"),
    ):
        rows, problems = read_rows(Source(str(tmp_path / "mutated.jsonl"), *fields), TRAIN_SPLITS)
        assert len(rows) + len(problems) == sum(bool(line.strip()) for line in lines)
        assert all(row.question.strip() and row.answer.strip() for row in rows)
        assert all(len(problem) < 2000 for problem in problems.values())
        for row in rows[::7]:
            normalise(row.question).encode()
        counts.add(len(rows))
    assert min(counts) > 30
