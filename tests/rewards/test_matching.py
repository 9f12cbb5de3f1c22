"""Rewards that compare text: the integer, the exact answer, the letter of a choice."""

from __future__ import annotations

import pytest

from nemo_aapo.rewards import build_reward
from tests.rewards.judging import judge


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("7", "3+4=7", 1),
        ("7", "10-3=7.", 1),
        ("3", "10-3", 1),
        ("-3", "7 - 10 = -3", 1),
        ("-3", "\\boxed{-3}, not 3", 1),
        ("1500", "1,500", 1),
        ("12", "(1,2)", 0),
        ("7", "7.0", 1),
        ("5", "3.5", 0),
        ("7", "seven", 0),
        ("7", "\\boxed{seven}, 7", 0),
        ("007", "7", 1),
        ("27.0", "27", 1),
        ("1234", "1{,}234", 1),
        ("-7", "it is \u22127", 1),
        *[
            ("7", f"\\boxed{{{box}}}", 1)
            for box in ("7.0", "x=7", "7 apples", "\\text{7}", "$7$", "\uff17", "7^\\circ", "\\$7")
        ],
        *[
            ("7", f"7: \\boxed{{{box}}}", 0)
            for box in ("\\frac{7}{8}", "7, 8", "8, 7", "", "7 \\times 2", "7.5", "-7", "7^2")
        ],
        *[("1234", f"\\boxed{{{box}}}", 1) for box in ("1{,}234", "1,234", "1\\,234", "1\u202f234")],
        ("2", "\\boxed{9^{2}}", 0),
        ("-7", "\\boxed{\u22127}", 1),
        ("7", "7, so \\boxed{7", 0),
        ("7", "\\boxed {7} or \\fbox{7}", 1),
        ("7", "<think>8</think><answer>7</answer> 8", 1),
        ("7", "<answer>The answer is 7.</answer> 8", 1),
        ("7", "<answer>8</answer> 7", 0),
    ],
)
def test_integer_takes_the_last_number(gold, text, value):
    assert judge("integer", gold, text) == value


def test_integer_refuses_a_gold_answer_that_is_none():
    for gold in ("3.5", "x", "", "1 2", "nan", "None", "1, 2", "7_8"):
        with pytest.raises(ValueError, match="not an integer"):
            build_reward({"name": "integer"}).check_answer(gold)


def test_exact_ignores_white_space_around_and_nothing_else():
    assert [judge("exact", "a b", text) for text in (" a b\n", "a  b", "A b", "")] == [1, 0, 0, 0]
    assert [
        judge("exact", "9", text) for text in ("<answer> 9</answer>", "8 <answer>9</answer>", "<answer>8</answer>9")
    ] == [1, 1, 0]


def test_exact_refuses_what_programs_write_for_a_missing_answer():
    for gold in ("nan", "None", " null", "N/A", "-Infinity"):
        with pytest.raises(ValueError, match="missing value"):
            build_reward({"name": "exact"}).check_answer(gold)


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("B", "So it is \\boxed{B}.", 1),
        ("(B)", "\\boxed{\\text{(B)}}", 1),
        ("B", "\\boxed{A} or rather \\boxed{B. 7 pears}", 1),
        ("B", "The answer is (B), not (C).", 1),
        ("B", "Option C is wrong. The correct answer: **B**", 1),
        ("B", "I think of A.\n\nB.\n", 1),
        ("B", "A\nB\nC", 0),
        ("B", "\\boxed{7}, the answer is B", 0),
        ("B", "The answer is Bob's.", 0),
        ("A", "A pear costs more. The answer is a secret.", 0),
        *[
            ("C", f"\\boxed{{{box}}}", 1)
            for box in ("\\text{Option C}", "\\textrm{C}", "$C$", "\\bf C", "(C) 12", "C: pears")
        ],
        *[
            ("C", f"\\boxed{{{box}}}", 1)
            for box in ("\\textbf{(C)}\\ 12", "\\mathrm{(C)}", "\uff23", "C pears", "{C}", "C.")
        ],
        *[("A", f"A \\boxed{{{box}}}", 0) for box in ("A, B, C, D", "A or B", "A pear", "AB", "", "\\text{B}")],
        ("C", "<think>A</think><answer>C</answer> The answer is B", 1),
        ("C", "<answer>The answer is C.</answer>", 1),
        ("C", "<think>\\boxed{A}</think><answer>\\boxed{C}</answer>", 1),
        ("B", "The answer is B: \\boxed{B", 0),
        ("B", "", 0),
    ],
)
def test_multiple_choice_takes_the_letter_that_was_decided_for(gold, text, value):
    assert judge("multiple_choice", gold, text) == value


def test_multiple_choice_refuses_a_gold_answer_that_is_no_letter():
    reward = build_reward({"name": "multiple_choice"})
    reward.check_answer("(C)")
    for gold in ("7", "AB", "", "b"):
        with pytest.raises(ValueError, match="not the letter of a choice"):
            reward.check_answer(gold)
