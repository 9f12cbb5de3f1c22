"""Accuracy's verdicts: the tables of ``verdicts.py``, and what holds for any answer."""

from __future__ import annotations

import random
import re

import pytest

from nemo_aapo.rewards import build_reward
from nemo_aapo.text.answer import find_answer
from tests.rewards.judging import completion, judge, prompt
from tests.rewards.pairs import different_pairs
from tests.rewards.verdicts import COMPLETIONS, KNOWN_TO_BE_WRONG, PRESETS, REFUSED

PAIRS = 2000


def boxed(gold: str, answer: str) -> float:
    return judge("accuracy", gold, f"So it is \\boxed{{{answer}}}, I think.")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_answers_in_the_forms_of_the_known_data_sets_get_the_right_verdicts(preset):
    accuracy = build_reward({"name": "accuracy"})
    for gold, right, wrong in PRESETS[preset]:
        accuracy.check_answer(gold)
        verdicts = {answer: boxed(gold, answer) for answer in (gold, *right, *wrong)}
        assert verdicts == {**dict.fromkeys((gold, *right), 1.0), **dict.fromkeys(wrong, 0.0)}, gold


def test_a_completions_answer_is_what_its_tags_hold_or_its_last_box():
    verdicts = [judge("accuracy", gold, text) for gold, text, _ in COMPLETIONS]
    wrong = [row for row, verdict in zip(COMPLETIONS, verdicts, strict=True) if verdict != row[2]]
    assert not wrong


@pytest.mark.parametrize("gold", REFUSED)
def test_a_gold_answer_that_is_none_is_refused_and_never_scores(gold):
    accuracy = build_reward({"name": "accuracy"})
    for refused in (lambda: accuracy.check_answer(gold), lambda: accuracy(prompt(gold), "\\boxed{1}", completion())):
        with pytest.raises(ValueError, match=r"can't parse|missing value"):
            refused()


def test_the_verdicts_that_are_known_to_be_wrong_are_still_the_same():
    """A table for upgrades of math-verify: a row that changes leaves it, and docs/guide/rewards.md says so."""
    for gold, answer, value, _ in KNOWN_TO_BE_WRONG:
        if value < 0:
            with pytest.raises(ValueError, match="can't parse"):
                boxed(gold, answer)
        else:
            assert boxed(gold, answer) == value, (gold, answer)


def test_nothing_before_the_last_box_or_outside_the_tags_changes_a_verdict():
    rng = random.Random(1)
    golds = ["7", "\\frac{1}{2}", "(1,2)", "\\text{Yes}", "3:30 p.m."]
    shapes = ("\\boxed{%s}", "<answer>%s</answer>", "\\boxed{%s", "<answer>\\boxed{%s}</answer>")
    marked = [shape % answer for answer in ("7", "8", "", "\\frac{1}", "1/2", "Yes") for shape in shapes]
    before = [
        "It is 7. ",
        "\\boxed{7} or not: ",
        "answer: $\\frac{1}{2}$. ",
        "{",
        "\\boxed{8 ",
        "The final answer is 7. ",
    ]
    for text in marked:
        for gold in golds:
            alone = judge("accuracy", gold, text)
            told = "".join(rng.sample(before, 3)) + "so: "
            assert judge("accuracy", gold, told + text) == alone, (gold, told, text)
            if text.endswith("</answer>"):
                assert judge("accuracy", gold, f"{text} 7, \\boxed{{7}} or 1/2") == alone, (gold, text)


@pytest.mark.slow
def test_two_thousand_pairs_of_different_answers_are_told_apart_both_ways_round_and_each_is_right_by_itself():
    for a, b in different_pairs(PAIRS, random.Random(0)):
        assert boxed(a, b) == boxed(b, a) == 0, (a, b)
        assert boxed(a, a) == 1, a


LOOKS = {
    "spaces": "  {} ", "line breaks": "\n{}\n", "a full stop": "{}.", "a semicolon": "{};", "dollars": "${}$",
    "parentheses of LaTeX": "\\({}\\)", "display": "\\[{}\\]", "thin spaces": "\\,{}\\;",
    "a space of LaTeX": "\\ {}\\ ",
    "a style": "\\displaystyle {}", "a size": "\\large {}", "braces": "{{{}}}", "bold": "**{}**",
    "a font": "\\mathbf{{{}}}", "a colour": "\\textcolor{{red}}{{{}}}", "zero width": "\u200b{}\ufeff",
    "a wide space": "{}\\quad", "a tilde": "{}~",
}  # fmt: skip
SPELLINGS = [
    ("-", "\u2212"), ("-", "\u2013"), ("\\frac{", "\\dfrac{"), ("\\frac{", "\\tfrac{"), ("}{", "} {"), (" ", "\u00a0"),
    ("\\pi", "\u03c0"), ("\\infty", "\u221e"), ("\\cup", "\u222a"), ("\\times", "\u00d7"), ("\\pm", "\u00b1"),
    ("^\\circ", "\u00b0"), ("^2", "\u00b2"), ("\\%", "%"), ("_8", "\u2088"), ("\\sqrt{2}", "\u221a2"), ("(", "\\left("),
    (")", "\\right)"), ("\\ge", "\u2265"), ("\\text{", "\\mathrm{"), ("\\text{", "\\mbox{"), ("\\in ", "\u2208 "),
    *((str(digit), chr(0xFF10 + digit)) for digit in range(10)),
]  # fmt: skip


@pytest.mark.slow
def test_looks_and_unicode_do_not_change_a_verdict():
    golds = ["-7", "\\frac{3}{4}", "(-2, 5)", "3 \\pm 2\\sqrt{2}", "x^2+\\pi", "90^\\circ", "12\\%", "\\text{Yes}"]
    golds += ["2516_8", "1.5 \\times 10^{-9}", "(-\\infty,2)\\cup(3,\\infty)", "x \\ge 2", "15\\text{ cm}^2"]
    for gold in golds:
        for look, form in LOOKS.items():
            assert boxed(gold, form.format(gold)) == 1, (gold, look)
        for spelling in SPELLINGS:
            said = gold.replace(*spelling)
            assert boxed(gold, said) == 1, (gold, said)
            assert boxed(said, gold) == 1, (said, gold)


def test_numbers_are_compared_exactly_and_decimals_to_six_places_and_five_digits():
    accepted = [("1/3", "0.333333"), ("\\pi", "3.141593"), ("1/17", "0.058824"), ("\\sqrt{2}", "1.4142136")]
    refused = [("1/3", "0.333"), ("\\pi", "3.14159"), ("1/3000", "0.000333"), ("0.1", "0.1000001"), ("0", "0.0000001")]
    assert [boxed(gold, said) for gold, said in accepted] == [1] * len(accepted)
    assert [boxed(gold, said) for gold, said in refused] == [0] * len(refused)


def test_format_and_accuracy_agree_on_the_projects_own_tags():
    for text in ("<think>2+7</think><answer>9</answer>", "<think>\n2+7\n</think>\n<answer>\n$\\boxed{9}$\n</answer>"):
        assert judge("format", "9", text) == judge("accuracy", "9", text) == 1
        assert judge("integer", "9", text) == judge("tag_count", "9", text) == 1
    assert judge("multiple_choice", "C", "<think>A</think><answer>(C)</answer>") == 1
    assert judge("exact", "9", "<think>8</think><answer> 9 </answer>") == 1


@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "\\boxed ",
        "\\fbox",
        "\\boxed{9}",
        "\\boxed{9},",
        "<answer>",
        "<answer>9</answer>",
        "}",
        "\\",
        " ",
        "1 and ",
    ],
)
def test_finding_an_answer_takes_time_in_proportion_to_the_text(piece):
    """Two megabytes are done in well under a second where nothing is quadratic; the deadline is the suite's own."""
    answer = find_answer(piece * (2_000_000 // len(piece)))
    assert len(answer.text) <= 2000
    assert re.fullmatch("box|tags|end", answer.where)


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("72", "48/2 = 24, 24 + 48 = 72. The answer is \\boxed{72}.", 1),
        ("72", "The answer is 72.", 1),
        ("72", "The answer is 73.", 0),
        ("72", "At first \\boxed{72}, but no: \\boxed{71}", 0),
        ("72", "It is \\boxed{72}, with 3 to spare, or 4.", 1),
        ("1500", "\\boxed{1,500}", 1),
        ("-3", "\\boxed{-3}", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("$\\frac12$", "\\boxed{\\dfrac{2}{4}}", 1),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", 1),
        ("(3, \\frac{\\pi}{2})", "\\boxed{3}", 0),
        ("x=3", "\\boxed{3}", 1),
        ("72", "\\boxed{72}. The final answer is $3$. I hope it is correct.", 1),
        ("72", "The final answer is $3$. I hope it is correct. It is \\boxed{72}.", 1),
        ("\\{1,2\\}", "\\boxed{\\{1,2\\}}, or 3", 1),
        ("1,2", "\\boxed{1} and \\boxed{2}", 1),
        ("12%", "\\boxed{12\\%}", 1),
        ("12", "\\boxed{12\\%}", 1),
        ("12\\%", "\\boxed{12.0\\%}", 1),
        ("12\\%", "\\boxed{13\\%}", 0),
        ("\\$15,\\!625", "\\boxed{15625}", 1),
        ("\\$5", "\\boxed{\\$6}", 0),
        ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", 1),
        ("4.5e33", "about $4.5 \\times 10^{33}$ erg", 1),
        ("1.6E-13", "\\boxed{1.6e-13}", 1),
        ("3e-12", "\\boxed{3 \\times 10^{-12}}", 1),
        ("4.5e33", "\\boxed{4.5 \\times 10^{32}}", 0),
        ("2e-3", "\\boxed{-3 + 2e}", 1),
        ("4", "9934 " + "a " * 499, 0),
        ("72", "", 0),
        ("72", "\\boxed{", 0),
        ("72", "no idea", 0),
        ("72", "72 " + "and so on " * 500, 0),
        ("72", "\\boxed{72}" + " hm" * 100_000, 1),
        ("34", "1" * 2000 + "34", 0),
    ],
)
def test_accuracy_is_mathematical_equality_of_the_last_boxed_answer(gold, text, value):
    assert judge("accuracy", gold, text) == value


def test_accuracy_puts_the_gold_answer_first():
    # math-verify takes an interval for a gold inequality, but no inequality for a gold interval.
    assert judge("accuracy", "1 < x < 2", "\\boxed{(1,2)}") == 1
    assert judge("accuracy", "(1,2)", "\\boxed{1 < x < 2}") == 0


def test_a_gold_answer_that_passes_the_check_scores_when_it_is_boxed():
    rng = random.Random(0)
    numbers = [str(rng.randint(-(10**k), 10**k)) for k in range(1, 12)]
    golds = [*numbers, "\\frac{7}{3}", "2\\sqrt{3}", "50\\%", "90^\\circ", "\\text{no solution}", "[2,5)", "x^2+1", "A"]
    golds += ["50%", "20\\%, 30\\%", "\\$18.90", "5\\$"]
    for gold in golds:
        build_reward({"name": "accuracy"}).check_answer(gold)
        assert judge("accuracy", gold, f"So it is \\boxed{{{gold}}}.") == 1, gold
        assert judge("accuracy", gold, "So it is \\boxed{987654321987}.") == 0, gold
