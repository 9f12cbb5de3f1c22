"""What sources have in common, or training and held-out data, is found whatever its dress, and dropped or refused."""

from __future__ import annotations

import pytest

from nemo_aapo.data.contamination import conflicts, normalise, overlap
from nemo_aapo.data.loading import build_sampler, load_data
from nemo_aapo.data.prompts import load_prompts
from nemo_aapo.errors import DataError
from tests.tiny_models import make_config

ROWS = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(20)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is $\\dfrac{1}{2}$ of 1,000?", "what is \\(\\frac{1}{2}\\) of 1,000", True),
        ("Find  x.\nNow!", "find x, now", True),
        ("1+2=", "1-2=", False),
        ("is it 1.5?", "is it 15?", False),
        ("\\left(3,4\\right)", "(3,4)", True),
        ("the leftover", "the over", False),
        ("What is 12*3?", "What is 1*23?", False),
        ("What is 5!?", "What is 5?", False),
        ("Find the GCD of 12, 3.", "Find the GCD of 1, 23.", False),
        ("What is 2²?", "What is 22?", False),
        ("Simplify 3:4", "Simplify 34", False),
        ("Find f'(2)", "Find f(2)", False),
        ("\\frac{1}{23}", "\\frac{12}{3}", False),
        ("y'' + y = 0", "y' + y = 0", False),
        ("2**3", "2*3", False),
        ("log₂8", "log 28", False),
        ("Is it .5?", "Is it 5?", False),
        ("12\\ 3", "123", False),
        ("2² * 3, 4", "$2^{2}*3,4$", True),
        ("\\frac12 and \\tfrac 3{45}", "\\frac{1}{2} and \\frac{3}{45}", True),
        ("There are **5** 'odd' boys: **3** run!", "There are 5 odd boys; 3 run.", True),
        ("10\\,cm, 5\\;kg", "10 cm, 5 kg", True),
        ("$5\\,!$", "5!", True),
        ("\\leftarrow", "\\arrow", False),
        ("Is **7** a *3* (three)? Add **2*3** now!", "Is 7 a 3 (three)? Add 2*3 now!", True),
        ("12 *3* 4", "12*3*4", True),
        ("2*.5", "2.5", False),
        ("2, .5", "2.5", False),
        ("It's 5 o'clock. Is 'y' in f' (x)?", "Its 5 oclock. Is y in f'(x)?", True),
    ],
)
def test_questions_are_equal_if_only_their_dress_differs(one, other, same):
    assert (normalise(one) == normalise(other)) == same


OPERATORS = [
    ("12", "*", "3"), ("12", "**", "3"), ("$2", "*", "x$"), ("n", "*", "(m+1)"), ("$2$", "*", "$5$"), ("2", "*", ".5"),
    ("3", ":", "45"), ("$3$", ":", "$4$"), ("3", ":", ".5"), ("5", "!", ""), ("n", "!!", ""), ("(n+1)", "!", "/2"),
    ("f", "'", "(x)"), ("sin", "''", "(2)"), ("y", "''", "= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "operator", "right"), OPERATORS)
def test_an_operator_is_the_same_one_whatever_its_spacing_and_never_punctuation(left, operator, right):
    def forms(text):
        spaced = (f"{left}{before}{text}{after}{right}" for before in ("", " ", "\n  ") for after in ("", " ", "\t "))
        return {normalise(f"What is {expression} now?") for expression in spaced}

    (form,) = forms(operator)
    assert form not in forms(",") | forms("") | forms(operator[0] * (3 - len(operator)))


@pytest.mark.parametrize(
    "piece", ["*", "* ", " *a", "**a ", "*a* 1", "$", " $*", "!", "'", "x'", "1 ", ": ", "\\frac", "{"]
)
def test_no_text_takes_more_time_than_in_proportion_to_its_length(piece):
    """With the square of it, this would take minutes."""
    assert not set(normalise(piece * 30_000)) & set(" $*!:")


def test_overlap_finds_equal_questions_and_long_ones_inside_a_template():
    long = "Ada has 12 apples and gives 3 to each of her friends. How many friends get some, if none is left?"
    found = overlap(
        [f"Solve this. {long} Think first.", "2+2?", "what is 2 + 3 ?", long.upper()], [long, "What is 2+3?"]
    )
    assert found == {0: long, 2: "What is 2+3?", 3: long}
    assert overlap(["a 2+3? b"], ["2+3?"]) == {}  # too short to be found inside
    assert conflicts(["1+1?", "1 + 1 ?", "1+1", "2+2"], ["2", "3", "2", "4"]) == [[0, 1, 2]]


def test_contamination_is_reported_dropped_or_an_error(write, tokenizer, caplog):
    train = write("train.jsonl", [*ROWS, {"question": "what is  3 + 3", "answer": "6"}])
    held_out = write("held_out.jsonl", ROWS[2:5])

    def load(action):
        data = make_config("model", train, held_out, data__on_contamination=action).data
        return load_data(data, tokenizer)[0]

    assert len(load("report").prompts) == 21
    assert "4 of 21 training prompts are among the held-out ones" in caplog.text
    dropped = load("drop")
    assert [p.answer for p in dropped.prompts] == [row["answer"] for row in [*ROWS[:2], *ROWS[5:]]]
    assert (dropped.contaminated, dropped.shares) == (4, ((17, 1.0),))
    with pytest.raises(DataError, match=r"4 of 21 .* set data.on_contamination=drop"):
        load("error")


def test_several_sources_are_joined_and_what_two_have_is_there_once(write, tokenizer):
    one = write("one.jsonl", ROWS[:12])
    two = write("two.jsonl", [{"q": row["question"], "a": row["answer"]} for row in ROWS[8:]])
    held_out = write("held_out.jsonl", [{"question": "x?", "answer": "1"}])
    sources = [{"path": str(one), "weight": 3.0}, {"path": str(two), "prompt_field": "q", "answer_field": "a"}]
    config = make_config("model", validation=held_out, data__train=sources)
    loaded, _ = load_data(config.data, tokenizer)
    assert (loaded.shares, loaded.duplicates) == (((12, 3.0), (8, 1.0)), 4)
    assert [p.answer for p in loaded.prompts] == [row["answer"] for row in ROWS]
    sampler = build_sampler(config, loaded)
    taken = [index for step in range(4) for index in sampler.indices(step)]
    assert sum(index < 12 for index in taken) == 12
    again = make_config("model", validation=held_out, data__train=[{"path": str(one)}, {"path": str(one)}])
    with pytest.raises(DataError, match="all its prompts are in the sources before it"):
        load_data(again.data, tokenizer)


def test_repeats_are_dropped_before_they_cost_anything(write, tokenizer):
    loaded = load_prompts(write("rows.jsonl", ROWS * 100), tokenizer, max_prompt_tokens=40)
    assert (len(loaded.prompts), loaded.duplicates) == (20, 1980)
