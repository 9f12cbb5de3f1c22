"""Files of every form give the same rows, and what a form can't say is refused with file, line and remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemo_aapo.config.schema import EvaluationFields
from nemo_aapo.config.sources import FILE_FORMATS, Source
from nemo_aapo.data.formats import json_text
from nemo_aapo.data.prepare import prepare
from nemo_aapo.data.records import check_source, read_chunks, read_records
from nemo_aapo.data.rows import HELD_OUT_SPLITS, TRAIN_SPLITS, read_rows
from nemo_aapo.errors import DataError
from nemo_aapo.evaluation.benchmarks import load_problems

ROWS = [
    {"question": "What is 1+1?", "answer": "2"},
    {"question": 'He said "x, y".\nTwice; why\t?', "answer": "007"},
    {"question": "Größe?", "answer": "9007199254740993"},
    {"question": "P?", "answer": "27"},
]


def table(rows, separator: str, end: str = "\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if set(text) & set('",;\t\n') else text

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(separator.join(map(cell, line)) + end for line in lines)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "rows.csv": table(ROWS, ","),
    "windows.csv": "\ufeff" + table(ROWS, ",", "\r\n"),
    "blank_lines.csv": table(ROWS, ",").replace("P?", "P?", 1) + "\n\n",
    "rows.tsv": table(ROWS, "\t"),
    "more.csv": table([{"n": str(n), **row, "": "x"} for n, row in enumerate(ROWS)], ","),
    "rows.ndjson": LINES,
    "rows.json": json.dumps(ROWS),
    "printed.json": json.dumps(ROWS, indent=2),
    "a_row_a_line.json": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "data.json": json.dumps({"version": "1.0", "data": ROWS}),
    "data_printed.json": json.dumps({"data": ROWS, "tags": ["a", "b"]}, indent=4),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects.jsonl": "\n\n".join(json.dumps(row, indent="\t") for row in ROWS) + "\n",
    "array.jsonl": json.dumps(ROWS),
    "no_ending": LINES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("formats")
    for name, text in FORMS.items():
        (made / name).write_bytes(text.encode())
        if "." in name:
            (made / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (made / "packed.jsonl").write_bytes(gzip.compress(LINES.encode()))
    return made


@pytest.mark.parametrize("name", [*FORMS, *(f"{name}.gz" for name in FORMS if "." in name), "packed.jsonl"])
def test_every_form_gives_the_same_rows_to_runs_preparation_and_evaluation(folder, name):
    path = str(folder / name)
    found = read_rows(Source(path), TRAIN_SPLITS)
    assert not found.problems
    assert [(row.question, row.answer) for row in found.rows] == [tuple(row.values()) for row in ROWS]
    assert [row.question for row in prepare(Source(path))[0]] == [row["question"] for row in ROWS]
    problems, _ = load_problems("own", {"path": path, "split": "train"} if "splits" in name else path, FIELDS)
    assert [(problem.question, problem.answer) for problem in problems] == [tuple(row.values()) for row in ROWS]
    assert [chunk.done for chunk in read_chunks(Source(path), TRAIN_SPLITS)][-1] == 1.0


FIELDS = EvaluationFields(question="question", answer="answer", level=None, subject=None)


def test_a_row_is_named_by_the_line_that_it_begins_on(folder):
    def numbers(name):
        return [record.number for record in read_records(Source(str(folder / name)), TRAIN_SPLITS)]

    assert numbers("rows.csv") == [2, 3, 5, 6]
    assert numbers("objects.json") == [1, 5, 9, 13]
    assert numbers("rows.ndjson") == numbers("printed.json") == [1, 2, 3, 4]


def test_splits_of_one_file_are_chosen_as_those_of_a_data_set(folder):
    path = str(folder / "splits.json")
    assert len(read_rows(Source(path), HELD_OUT_SPLITS).rows) == 1
    assert len(read_rows(Source(path, split="train"), HELD_OUT_SPLITS).rows) == 4
    with pytest.raises(DataError, match="there is no split dev; there is test, train: name one"):
        read_rows(Source(path, split="dev"), TRAIN_SPLITS)
    for name in ("rows.json", "rows.csv", "objects.json", "columns.json"):
        with pytest.raises(DataError, match="this is one file, split=train has no effect"):
            read_rows(Source(str(folder / name), split="train"), TRAIN_SPLITS)


def test_a_table_without_a_header_is_read_by_the_numbers_of_its_columns(tmp_path):
    (tmp_path / "bare.csv").write_text("1,What is 1+1?,2\n2,What is 2+2?,4\n")
    rows, _ = read_rows(Source(str(tmp_path / "bare.csv"), "1", "2"), TRAIN_SPLITS)
    assert [(row.number, row.question, row.answer) for row in rows] == [
        (1, "What is 1+1?", "2"),
        (2, "What is 2+2?", "4"),
    ]
    _, problems = read_rows(Source(str(tmp_path / "bare.csv")), TRAIN_SPLITS)
    assert problems == {
        2: "no prompt: the key \"question\" is missing; there is '1', 'What is 1+1?', '2' (set data.prompt_field)"
    }


REFUSED = {
    "twice.csv": ("question,answer,answer\na,1,2\n", r"twice.csv:1: more than one column is called 'answer'"),
    "european.csv": ("question;answer\na;1\n", "semicolons stand between the cells, where a .csv file has commas"),
    "tabs.csv": ("question\tanswer\na\t1\n", "tabs stand between the cells"),
    "commas.tsv": ("question,answer\na,1\n", "commas stand between the cells, where a .tsv file has tabs"),
    "utf16.csv": ("question,answer\na,1\n".encode("utf-16"), "this is UTF-16; save it as UTF-8"),
    "utf16.json": (LINES.encode("utf-16"), "this is UTF-16"),
    "cut.json": ("[\n" + ",\n".join(map(json.dumps, ROWS)), r"cut.json:5: not JSON: Expecting ',' delimiter: line 5"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], "not a .gz file that can be read"),
    "bad.csv.gz": (gzip.compress(table(ROWS, ",").encode())[:20] + b"no" * 20, "not a .gz file that can be read"),
    "rows.xlsx": (b"PK\x03\x04", f"a file of this kind is not read. Read are {', '.join(FILE_FORMATS)}"),
    "rows.txt": ("1+1? 2", "a file of this kind is not read"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "a file of this kind is not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cant_be_read_is_refused_with_the_reason(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list(read_records(Source(str(tmp_path / name)), TRAIN_SPLITS))
    if "not read" in message:
        with pytest.raises(DataError, match=message):
            check_source(Source(str(tmp_path / name)))


BAD_ROWS = {
    "short.csv": ("question,answer\na,1\nb\n", {3: "not as the header: 1 cells for 2 columns"}),
    "long.csv": ("question,answer\na,1,2\nb,1\n", {2: "not as the header: 3 cells for 2 columns"}),
    "quote.csv": ('question,answer\na,1\n"b,1\nc,2\n', {3: "a quote opens here that nothing closes"}),
    "inside.csv": ('question,answer\n"a"b,1\nc,2\n', {2: "not csv: ',' expected after '\"'"}),
    "latin1.csv": (
        "question,answer\nGröße?,1\nc,2\n".encode("latin-1"),
        {2: "not UTF-8: byte 0xf6 in column 1; save it as UTF-8"},
    ),
    "empty.csv": (
        "question,answer\na,\n,1\n",
        {2: 'no answer: "answer" is empty', 3: 'no prompt: "question" is empty'},
    ),
    "latin1.json": (json.dumps([ROWS[2]], indent=1, ensure_ascii=False).encode("latin-1"), None),
    "one_bad.json": (
        "\n".join(json.dumps(row, indent=1) for row in ROWS[:2]).replace('"007"', "007")
        + "\n"
        + json.dumps(ROWS[3], indent=1),
        {5: "not JSON: Expecting ',' delimiter: line 7 column 13 (char 111)"},
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, name):
    content, problems = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if problems is None:
        with pytest.raises(DataError, match=r"latin1.json:1: not UTF-8: byte 0xf6; save it as UTF-8"):
            read_rows(Source(str(tmp_path / name)), TRAIN_SPLITS)
    else:
        assert read_rows(Source(str(tmp_path / name)), TRAIN_SPLITS).problems == problems


# ---------------------------------------------------------------- missing values and numbers

NO_ANSWERS = (
    "nan",
    "NaN",
    "None",
    "null",
    "NULL",
    "N/A",
    "n/a",
    "NA",
    "<NA>",
    "Infinity",
    "-inf",
    "#### nan",
    " None ",
)


def test_what_stands_for_a_missing_value_is_no_gold_answer_in_any_form(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"q,{answer}\n" for answer in NO_ANSWERS))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"question": "q", "answer": a}) + "\n" for a in NO_ANSWERS))
    literals = ("NaN", "Infinity", "-Infinity", "1e999", "null", "true", '""')
    (tmp_path / "b.jsonl").write_text("".join(f'{{"question": "q", "answer": {a}}}\n' for a in literals))
    holes = pyarrow.table({"question": ["q"] * 3, "answer": [float("nan"), None, float("inf")]})
    parquet.write_table(holes, tmp_path / "c.parquet")
    for name in ("a.csv", "a.jsonl", "b.jsonl", "c.parquet"):
        found = read_rows(Source(str(tmp_path / name)), TRAIN_SPLITS)
        assert not found.rows, name
        assert all(problem.startswith("no answer: ") for problem in found.problems.values()), name
        assert not prepare(Source(str(tmp_path / name)))[0]
        with pytest.raises(DataError, match="row\\(s\\) can't be used"):
            load_problems("own", str(tmp_path / name), FIELDS)
    boxed = Source(str(tmp_path / "d.jsonl"), answer_form="boxed")
    Path(boxed.path).write_text(json.dumps({"question": "q", "answer": "so \\boxed{NaN}"}))
    assert "stands for a missing value" in read_rows(boxed, TRAIN_SPLITS).problems[1]
    Path(boxed.path).write_text(json.dumps({"question": "nan", "answer": "\\boxed{1}"}))
    assert read_rows(boxed, TRAIN_SPLITS).problems == {1: "no prompt: 'nan' stands for a missing value"}


def test_a_number_is_the_one_that_was_written_whatever_type_its_column_has(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"question": ["a", "b", "c"], "answer": [27.0, 0.5, -3.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "floats.parquet")
    rows, _ = read_rows(Source(str(tmp_path / "floats.parquet")), TRAIN_SPLITS)
    assert [row.answer for row in rows] == ["27", "0.5", "-3"]
    narrow = pyarrow.array([0.1, None, 3.0], pyarrow.float32())
    parquet.write_table(pyarrow.table({**columns, "answer": narrow}), tmp_path / "narrow.parquet")
    rows, problems = read_rows(Source(str(tmp_path / "narrow.parquet")), TRAIN_SPLITS)
    assert ([row.answer for row in rows], list(problems)) == (["0.1", "3"], [2])
    columns = {"answer": narrow, "halves": narrow.cast(pyarrow.float16()), "of_few": narrow.dictionary_encode()}
    columns["below"] = pyarrow.StructArray.from_arrays([narrow], ["answer"])
    columns["lists"] = pyarrow.array([[{"a": 0.1}]] * 3, pyarrow.list_(pyarrow.struct([("a", pyarrow.float32())])))
    table = pyarrow.table({"question": ["a", "b", "c"], **columns})
    parquet.write_table(table, tmp_path / "below.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    saved = pytest.importorskip("datasets").Dataset(table.drop(["halves", "of_few"]))
    saved.save_to_disk(tmp_path / "saved")
    saved.with_format("numpy").save_to_disk(tmp_path / "numpy")
    for name in ("below.parquet", "a.arrow", "saved", "numpy"):
        wanted = ("answer", "halves", "of_few", "below.answer") if "." in name else ("answer", "below.answer")
        for field in wanted:
            rows, _ = read_rows(Source(str(tmp_path / name), answer_field=field), TRAIN_SPLITS)
            assert [row.answer for row in rows] == ["0.1", "3"], (name, field)
        first = next(read_records(Source(str(tmp_path / name), answer_field="lists"), TRAIN_SPLITS))
        assert first.value["lists"] == [{"a": 0.1}]
    numbers = ("9007199254740993", "27.0", "-0.0", "1e3", "9007199254740993.0", "1" * 400)
    (tmp_path / "n.jsonl").write_text("".join(f'{{"question": "q", "answer": {n}}}\n' for n in numbers))
    rows, problems = read_rows(Source(str(tmp_path / "n.jsonl")), TRAIN_SPLITS)
    assert [row.answer for row in rows] == ["9007199254740993", "27", "0", "1000", "1" * 400]
    assert "a float is not exact there" in problems[5]


@pytest.mark.slow
def test_the_cells_of_a_directory_of_tables_stay_text(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.csv").write_text(table([*ROWS, {"question": "hole", "answer": ""}], ","))
    found = read_rows(Source(str(tmp_path / "copy")), TRAIN_SPLITS)
    assert [(row.question, row.answer) for row in found.rows] == [tuple(row.values()) for row in ROWS]
    assert found.problems == {5: 'no answer: "answer" is empty'}


def test_an_empty_system_message_is_no_empty_question(tmp_path):
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}]
    rows = [{"question": chat, "answer": "2"}, {"question": [chat[0], {"role": "user", "content": " "}], "answer": "2"}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    found = read_rows(Source(str(tmp_path / "chat.json")), TRAIN_SPLITS)
    assert [(row.question, row.before) for row in found.rows] == [("1+1?", ({"role": "system", "content": ""},))]
    assert found.problems == {2: 'no prompt: "question" is empty'}


def test_a_row_of_a_binary_file_that_is_not_utf_8_is_one_problem_by_its_number(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    questions = pyarrow.array([b"1+1?", b"2+2?", b"caf\xe9?", b"3+3?"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"question": questions, "answer": ["2", "4", "5", "6"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        rows, problems = read_rows(Source(str(tmp_path / name)), TRAIN_SPLITS)
        assert [(row.number, row.answer) for row in rows] == [(1, "2"), (2, "4"), (4, "6")]
        assert problems == {3: "not UTF-8: byte 0xe9"}


def test_a_binary_file_without_rows_is_empty(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in ("question", "answer")})
    parquet.write_table(table, tmp_path / "rows.parquet")
    batch = pyarrow.record_batch([pyarrow.array([], pyarrow.string())] * 2, schema=table.schema)
    for name, batches in (("none.arrow", []), ("one.arrow", [batch])):
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            for part in batches:
                writer.write_batch(part)
    for name in ("rows.parquet", "none.arrow", "one.arrow"):
        found = read_rows(Source(str(tmp_path / name)), TRAIN_SPLITS)
        assert (found.rows, found.problems) == ([], {})
        with pytest.raises(DataError, match=f"{name}: no problems in it"):
            load_problems("own", str(tmp_path / name), FIELDS)


@pytest.mark.parametrize("damaged", ['{"question": "cut', '{"question": "cut", "answer"', "}", "caf\udce9"])
def test_a_damaged_first_line_is_one_problem_and_does_not_make_a_document_of_the_file(tmp_path, monkeypatch, damaged):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{damaged}\n{LINES}".encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(json_text, "_document", lambda path: pytest.fail("the whole file was read"))
    rows, problems = read_rows(Source(str(path)), TRAIN_SPLITS)
    assert ([row.number for row in rows], list(problems)) == ([2, 3, 4, 5], [1])


@pytest.mark.parametrize("around", ["[\n{}\n]", '{{"data": [\n{}\n]}}', '{{"data":\n[{}]}}'])
def test_a_document_whose_second_line_is_a_value_is_still_one(tmp_path, around):
    path = tmp_path / "rows.json"
    path.write_text(around.format(json.dumps(ROWS[0])))
    rows, problems = read_rows(Source(str(path)), TRAIN_SPLITS)
    assert ([row.answer for row in rows], problems) == (["2"], {})
