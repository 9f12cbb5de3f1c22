"""Rows of the benchmarks, in the forms that the published data sets have, become questions and gold answers."""

from __future__ import annotations

import contextlib
import json
import random

import pytest

from nemo_aapo.config.schema import EvaluationFields
from nemo_aapo.data.records import Record
from nemo_aapo.errors import ConfigError, DataError
from nemo_aapo.evaluation.benchmarks import BENCHMARKS, load_problems, read_problems
from nemo_aapo.evaluation.prompts import TEMPLATES, check_template, template_text
from nemo_aapo.evaluation.votes import answer_of

OWN = EvaluationFields("question", "answer", None, None)
URL = "https://artofproblemsolving.com/wiki/index.php/{}"
# benchmark, a row with the columns of a published data set (contents made up here), and what it means
ROWS = {
    "HuggingFaceH4/MATH-500": (
        "math500",
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "test/algebra/1.json",
        },
        ("What is $1+1$?", "2", "3", "Algebra"),
    ),
    "MATH": (
        "math500",
        {"problem": "Halve $x$.", "level": "Level 5", "type": "Precalculus", "solution": "So $\\boxed{\\frac{x}{2}}$."},
        ("Halve $x$.", "\\frac{x}{2}", "5", "Precalculus"),
    ),
    "HuggingFaceH4/aime_2024": (
        "aime24",
        {
            "id": 60,
            "problem": "Find $n$.",
            "solution": "...",
            "answer": "025",
            "url": URL.format("2024_AIME_I"),
            "year": "2024",
        },
        ("Find $n$.", "25", None, None),
    ),
    "Maxwell-Jia/AIME_2024": (
        "aime24",
        {"ID": "2024-I-1", "Problem": "Find $n$.", "Solution": "...", "Answer": 204},
        ("Find $n$.", "204", None, None),
    ),
    "AI-MO/aimo-validation-aime": (
        "aime24",
        {
            "id": 0,
            "problem": "Find $n$.",
            "solution": "...",
            "answer": "204",
            "url": URL.format("2024_AIME_II_Problems/Problem_3"),
        },
        ("Find $n$.", "204", None, None),
    ),
    "math-ai/aime25": ("aime25", {"problem": "Find $n$.", "answer": "70", "id": "0"}, ("Find $n$.", "70", None, None)),
    "yentinglin/aime_2025": (
        "aime25",
        {
            "id": 1,
            "problem": "Find $n$.",
            "answer": "70",
            "solution": "...",
            "url": URL.format("2025_AIME_I"),
            "year": 2025,
        },
        ("Find $n$.", "70", None, None),
    ),
    "AI-MO/aimo-validation-amc": (
        "amc23",
        {"id": 5, "problem": "Cities ...", "answer": 27.0, "url": URL.format("2023_AMC_12A_Problems/Problem_1")},
        ("Cities ...", "27", None, None),
    ),
    "math-ai/amc23": (
        "amc23",
        {"id": 0, "question": "Cities ...", "answer": "27.0", "url": URL.format("2023_AMC_12A_Problems/Problem_1")},
        ("Cities ...", "27", None, None),
    ),
    "knoveleng/AMC-23": ("amc23", {"problem": "Cities ...", "answer": "27"}, ("Cities ...", "27", None, None)),
    "math-ai/minervamath": (
        "minerva",
        {"question": "How fast?", "answer": "4.5e33"},
        ("How fast?", "4.5e33", None, None),
    ),
    "knoveleng/Minerva-Math": (
        "minerva",
        {"problem": "How fast?", "solution": "$v=\\boxed{3}$ m/s", "type": "Relativity (8.033)", "idx": 0},
        ("How fast?", "3", None, "Relativity (8.033)"),
    ),
    "Hothan/OlympiadBench": (
        "olympiadbench",
        {
            "id": 1606,
            "question": "Find all $x$.",
            "solution": ["..."],
            "final_answer": ["$\\frac{2}{3},1$"],
            "context": None,
            "modality": "Text-only",
            "difficulty": "Competition",
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
            "question_type": "Open-ended",
            "subfield": "Algebra",
            "subject": "Math",
            "language": "English",
        },
        ("Find all $x$.", "\\frac{2}{3},1", None, "Algebra"),
    ),
    "knoveleng/OlympiadBench": (
        "olympiadbench",
        {"question": "Find all $x$.", "answer": "$2$", "subfield": "Algebra"},
        ("Find all $x$.", "2", None, "Algebra"),
    ),
    "openai/gsm8k": (
        "gsm8k",
        {"question": "How many?", "answer": "6*3=<<6*3=18>>18\n#### 1,800"},
        ("How many?", "1800", None, None),
    ),
}


def read(benchmark: str, *rows: dict):
    return read_problems([Record(n, row) for n, row in enumerate(rows, start=1)], "rows", BENCHMARKS[benchmark])


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_published_form_says_question_answer_level_and_subject(name):
    benchmark, row, meaning = ROWS[name]
    ((problem,), repeats) = read(benchmark, row)
    assert (problem.question, problem.answer, problem.level, problem.subject) == meaning
    assert (problem.source, repeats) == ("rows:1", 0)


@pytest.mark.parametrize("name", ROWS)
def test_math_verify_takes_the_gold_answer_of_every_form(name):
    from nemo_aapo.rewards.math import Accuracy

    benchmark, row, _ = ROWS[name]
    Accuracy().check_answer(read(benchmark, row)[0][0].answer)


def test_a_collection_of_several_years_is_cut_to_the_benchmarks_own():
    rows = [{"problem": f"Q{year}", "answer": "1", "url": URL.format(f"{year}_AIME_I")} for year in (2022, 2023, 2024)]
    assert [problem.question for problem in read("aime24", *rows)[0]] == ["Q2024"]


def test_problems_are_known_by_question_and_answer_and_each_is_there_once():
    row = ROWS["openai/gsm8k"][1]
    problems, repeats = read("gsm8k", row, {**row, "question": "Other?"}, dict(row))
    assert (len(problems), repeats) == (2, 1)
    assert read("gsm8k", row)[0][0].id == problems[0].id != problems[1].id


@pytest.mark.parametrize(
    ("benchmark", "row", "said"),
    [
        ("gsm8k", {"q": "How many?", "answer": "1"}, "none of question; there is q, answer"),
        ("math500", {"problem": "P", "solution": "no box"}, "a boxed answer in solution"),
        ("aime24", {"problem": "P", "answer": "\\frac{1}{2}"}, "is not an integer"),
        ("aime25", {"problem": "P", "answer": True}, "neither text nor a number"),
        ("amc23", {"problem": "P", "answer": float("nan")}, "the answer is nan"),
        ("minerva", {"question": "  ", "answer": "1"}, "\"question\" is '  ', not text"),
        ("olympiadbench", ["not", "columns"], "not an object with columns"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_number_and_reason(benchmark, row, said):
    good = {"question": "Q", "problem": "Q", "answer": "1"}
    with pytest.raises(DataError) as refusal:
        read(benchmark, good, row)
    assert "rows:2: " in str(refusal.value)
    assert said in str(refusal.value)


def test_mutated_rows_are_read_or_refused_but_never_crash():
    generator = random.Random(7)
    junk = [None, "", "x", 0, -1.5, float("inf"), True, [], ["a", None], {"a": 1}, "\\boxed{", "$", "####", "\ud800"]
    for _ in range(3000):
        benchmark, row, _ = ROWS[generator.choice(list(ROWS))]
        row = dict(row)
        for _ in range(generator.randint(1, 3)):
            row[generator.choice(list(row))] = generator.choice(junk)
        with contextlib.suppress(DataError):
            read(benchmark, row)


def test_a_file_of_ones_own_is_read_by_its_columns(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"q": f"What is {n}?", "a": n, "hard": n % 2, "topic": "numbers"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = EvaluationFields("q", "a", "hard", "topic")
    problems, note = load_problems("mine", str(path), fields)
    assert [(p.question, p.answer, p.level, p.subject) for p in problems[:2]] == [
        ("What is 0?", "0", "0", "numbers"),
        ("What is 1?", "1", "1", "numbers"),
    ]
    assert note == ""
    with pytest.raises(DataError, match=r"none of question; there is q, a, hard, topic \(set fields.question\)"):
        load_problems("mine", str(path), OWN)
    with pytest.raises(DataError, match="mapping with path, subset and split"):
        load_problems("mine", {"file": str(path)}, fields)


def test_a_benchmark_of_another_size_than_it_commonly_has_is_remarked_on(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text(json.dumps(ROWS["HuggingFaceH4/MATH-500"][1]) + "\n")
    assert "500 as it is commonly used" in load_problems("math500", str(path), OWN)[1]


def test_answers_that_say_the_same_have_one_vote():
    halves = ("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "\\boxed{ 1/2 }", "\\boxed{$\\dfrac{2}{4}$}", "it is 0.50.")
    assert {answer_of(text) for text in halves} == {"1/2"}
    assert answer_of("so \\boxed{1{,}000 \\text{ cm}}") != answer_of("\\boxed{1000}")  # not every spelling is known
    assert answer_of("so 7 or <answer>1</answer>") == answer_of("\\boxed{1}") == "1"
    assert answer_of("7, that is \\boxed{7} or \\boxed{6") is None  # the verifiers judge what was opened last, too
    assert answer_of("\\boxed{1,000 \\text{ cm}}") == answer_of("\\boxed{1000}") == answer_of("1000 in the end")
    assert answer_of("\\boxed{\\left( 3, \\pi \\right)}") == answer_of("\\boxed{(3,\\pi)}") == "(3,\\pi)"
    assert (
        answer_of("\\boxed{\\text{Eve}}") == answer_of("\\boxed{Eve}") == "Eve"
    )  # words are units only behind something
    assert answer_of("\\boxed{12\\%}") == answer_of("\\boxed{12%}") == answer_of("\\boxed{\\$12}") == "12"
    assert answer_of("nothing at all") is None
    assert answer_of("\\boxed{}") is None
    assert answer_of("\\boxed{1/0}") == "1/0"


def test_any_text_has_a_vote_or_none_but_never_a_crash():
    generator = random.Random(11)
    pieces = [
        "\\boxed{",
        "}",
        "{",
        "\\frac{1}{2}",
        "1,000",
        "-",
        "/",
        ".",
        "0",
        "9" * 40,
        "x",
        " ",
        "\\text{a}",
        "\\\\",
    ]
    for _ in range(5000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 12)))
        assert answer_of(text) is None or len(answer_of(text)) <= 200


def test_prompts_have_a_place_for_the_question():
    for name, text in TEMPLATES.items():
        check_template(name)
        assert text.count("{question}") == 1
    assert template_text("Q: {question}") == "Q: {question}"
    assert "$\\boxed{ANSWER}$" in template_text("open_rs")
    with pytest.raises(ConfigError, match="known are open_rs"):
        check_template("openrs")
