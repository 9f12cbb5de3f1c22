"""Rewards judge right, and whatever a completion or a user's function does costs its own item only."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from nemo_aapo.rewards import REWARDS, build_reward, reward_config
from nemo_aapo.types import Completion, Prompt


def prompt(answer: str = "72", text: str = "How many?") -> Prompt:
    return Prompt("id", np.arange(4, dtype=np.int32), text, answer, "data.jsonl:1")


def completion(tokens: int = 8, finish_reason: str = "stop") -> Completion:
    return Completion(np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), finish_reason, 0)


def judge(name: str, gold: str, text: str, **parameters) -> float:
    return build_reward({"name": name, **parameters})(prompt(gold), text, completion())


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


@pytest.mark.parametrize("gold", ["", "####", "\\frac{1}{", "}{", "\\boxed{"])
def test_a_gold_answer_that_cant_be_parsed_is_refused_and_never_scores(gold):
    reward = build_reward({"name": "accuracy"})
    with pytest.raises(ValueError, match="can't parse"):
        reward.check_answer(gold)
    with pytest.raises(ValueError, match="can't parse"):
        reward(prompt(gold), "\\boxed{1}", completion())


def test_a_gold_answer_that_passes_the_check_scores_when_it_is_boxed():
    rng = random.Random(0)
    numbers = [str(rng.randint(-(10**k), 10**k)) for k in range(1, 12)]
    golds = [*numbers, "\\frac{7}{3}", "2\\sqrt{3}", "50\\%", "90^\\circ", "\\text{no solution}", "[2,5)", "x^2+1", "A"]
    golds += ["50%", "20\\%, 30\\%", "\\$18.90", "5\\$"]
    for gold in golds:
        build_reward({"name": "accuracy"}).check_answer(gold)
        assert judge("accuracy", gold, f"So it is \\boxed{{{gold}}}.") == 1, gold
        assert judge("accuracy", gold, "So it is \\boxed{987654321987}.") == 0, gold


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
    ],
)
def test_integer_takes_the_last_number(gold, text, value):
    assert judge("integer", gold, text) == value


def test_integer_refuses_a_gold_answer_that_is_none():
    for gold in ("3.5", "x", "", "1 2"):
        with pytest.raises(ValueError, match="not an integer"):
            build_reward({"name": "integer"}).check_answer(gold)


def test_exact_ignores_white_space_around_and_nothing_else():
    assert [judge("exact", "a b", text) for text in (" a b\n", "a  b", "A b", "")] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<think>a</think><answer>b", 0),
        ("<think>a</think>b<answer>c</answer>", 0),
        ("hm <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> so", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer></think>b</answer>", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
        ("a</think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_format_is_one_think_and_one_answer_block_and_nothing_else(text, value):
    assert judge("format", "1", text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a\n</think>\nb", 1),
        ("a\n</think>\n\n<answer>7</answer>", 1),
        ("a</think>\nb", 0),
        ("a\n</think>\nb\n</think>\nc", 0),
        ("a", 0),
    ],
)
def test_the_think_style_wants_one_line_that_ends_thinking(text, value):
    reward = build_reward({"name": "format", "style": "think"})
    assert reward(prompt(text="1+1?<think>\n"), text, completion()) == value


@pytest.mark.parametrize(
    ("text", "opened", "think_answer", "think"),
    [
        ("<think>\na\n</think>\n<answer>b</answer>", False, 1.0, 1.0),
        ("a\n</think>\n<answer>b</answer>", True, 1.0, 1.0),
        ("a\n</think>\n<answer>b</answer>", False, 0.75, 0.5),
        ("<think><think></answer>", False, 0.25, 0.0),
        ("a\n</think>\nb\n</think>\n", True, 0.25, 0.5),
        ("", False, 0.0, 0.0),
    ],
)
def test_tag_count_is_the_share_of_tags_that_are_there_once(text, opened, think_answer, think):
    asked = prompt(text="1+1?<think>\n" if opened else "1+1?")
    for style, value in (("think_answer", think_answer), ("think", think)):
        assert build_reward({"name": "tag_count", "style": style})(asked, text, completion()) == value


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


def test_overlong_is_dapos_line_down_to_the_limit():
    reward = build_reward({"name": "overlong", "max_tokens": 100, "buffer_tokens": 20})
    values = [reward(prompt(), "", completion(n)) for n in (0, 80, 81, 90, 100, 101, 500)]
    assert values == pytest.approx([0, 0, -0.05, -0.5, -1, -1, -1])


@pytest.mark.parametrize(
    ("text", "size", "value"),
    [
        ("a b c d", 2, 0),
        ("a b a b a b", 2, -3 / 5),
        ("A b a B", 2, -1 / 3),
        ("a b c a b c a b c", 3, -4 / 7),
        ("so so so so", 1, -3 / 4),
        ("a b", 3, 0),
        ("", 3, 0),
    ],
)
def test_repetition_is_the_share_of_n_grams_that_were_there_before(text, size, value):
    assert judge("repetition", "1", text, ngram_size=size) == pytest.approx(value)
    rng = random.Random(0)
    words = [str(rng.randrange(6)) for _ in range(300)]
    for n in (1, 2, 3, 5):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        assert judge("repetition", "1", " ".join(words), ngram_size=n) == pytest.approx(
            len(set(grams)) / len(grams) - 1
        )


PIECES = ["", "\\boxed{", "}", "{", "\\", "$", "<think>", "</think>\n", "<answer>", "\ud800", "\x00", "9" * 40, "1,234"]
PIECES += ["\\frac{1}{", "\\left(", "^", "_", "(B)", "\u0661", "-", "%", "é\u202e", ".5.5", "\n"]


def mutate(text: str, rng: random.Random) -> str:
    """A few pieces put in or taken out."""
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice([*PIECES, text[:200]]) + text[start + rng.choice([0, 0, 1, 5, 30]) :]
    return text


def test_ten_thousand_mutated_completions_give_finite_scores_and_no_crash():
    """Cheap rewards, in this process; accuracy may need its limit and is in test_reward_runner.py."""
    rng = random.Random(3)
    seeds = [
        "<think>\n48/2 = 24, so 24 + 48 = 72.\n</think>\n<answer>\\boxed{72}</answer>",
        "The answer is (B).",
        "It is $\\frac{1}{2}$, or 0.5.\n\n\\boxed{\\text{B}} 1,234",
    ]
    rewards = [
        (build_reward({"name": name, **parameters}), gold)
        for name, gold, parameters in (
            ("integer", "72", {}),
            ("exact", "72", {}),
            ("multiple_choice", "B", {}),
            ("format", "72", {}),
            ("format", "72", {"style": "think"}),
            ("tag_count", "72", {}),
            ("repetition", "72", {}),
            ("overlong", "72", {"max_tokens": 9, "buffer_tokens": 4}),
            ("cosine", "72", {"max_tokens": 9, "verifier": "integer"}),
        )
    ]
    right = set()
    for _ in range(10_000):
        text = mutate(rng.choice(seeds), rng)
        for reward, gold in rewards:
            value = reward(prompt(gold), text, completion(rng.randrange(12)))
            assert math.isfinite(value), (reward, text)
            right |= {reward.name} if value == 1.0 else set()
    assert right >= {"integer", "multiple_choice", "format", "tag_count", "cosine"}


def test_format_counts_a_think_block_that_the_prompt_opened():
    reward = build_reward({"name": "format"})
    opened = prompt(text="<user>1+1?<assistant><think>\n")
    assert reward(opened, "a</think><answer>b</answer>", completion()) == 1
    assert reward(opened, "<think>a</think><answer>b</answer>", completion()) == 0


@pytest.mark.parametrize(("text", "short", "long"), [("7", 1.0, 0.5), ("8", -0.5, 0.0)])
def test_cosine_goes_from_short_to_long_by_tokens_and_is_flat_behind_the_limit(text, short, long):
    reward = build_reward({"name": "cosine", "max_tokens": 100, "verifier": "integer"})
    values = [reward(prompt("7"), text, completion(n)) for n in (0, 25, 50, 75, 100, 101, 150, 1000)]
    assert values[0] == short
    assert values[2] == pytest.approx((short + long) / 2)
    assert values[1] == pytest.approx(long + (short - long) * (1 + math.cos(math.pi / 4)) / 2)
    assert values[4:] == pytest.approx([long] * 4)
    assert sorted(values, reverse=short > long) == values


CONFIGS = [
    {"name": "accuracy"},
    {"name": "integer"},
    {"name": "exact"},
    {"name": "format"},
    {"name": "multiple_choice"},
    {"name": "reasoning_gym"},
    {"name": "tag_count", "style": "think"},
    {"name": "overlong", "max_tokens": 9, "buffer_tokens": 3},
    {"name": "repetition", "ngram_size": 4},
    {"name": "http", "url": "https://localhost:8000/score", "token_env": "REWARD_TOKEN"},
    {"name": "cosine", "max_tokens": 9, "wrong_long": -0.1},
    {"name": "custom", "function": "pkg.module:fn"},
]


def test_a_rewards_configuration_builds_its_equal():
    assert {config["name"] for config in CONFIGS} == set(REWARDS)
    for config in CONFIGS:
        reward = build_reward(config)
        assert build_reward(reward_config(reward)) == reward
        assert config.items() <= reward_config(reward).items()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "acuracy"}, "unknown reward 'acuracy'; did you mean 'accuracy'"),
        ({"max_tokens": 3}, "needs a name"),
        ({"name": "cosine", "max_token": 3}, "no parameter 'max_token'; did you mean 'max_tokens'"),
        ({"name": "integer", "x": 3}, r"no parameter 'x' \(it has: none\)"),
        ({"name": "cosine"}, "needs max_tokens"),
        ({"name": "cosine", "max_tokens": 0}, "max_tokens must be an integer of at least 1, not 0"),
        ({"name": "cosine", "max_tokens": 3, "wrong_long": math.nan}, "wrong_long must be a finite number"),
        ({"name": "cosine", "max_tokens": 3, "verifier": "format"}, "verifier must be one of"),
        ({"name": "format", "style": "xml"}, "style must be one of think_answer, think, not 'xml'"),
        ({"name": "overlong", "max_tokens": 3, "buffer_tokens": 4}, "buffer_tokens=4 is more than max_tokens=3"),
        ({"name": "repetition", "ngram_size": 0}, "ngram_size must be an integer of at least 1"),
        ({"name": "http", "url": "ftp://x"}, r"url must be http://\.\.\. or https://\.\.\., not 'ftp://x'"),
        ({"name": "http", "url": "http://u:secret@x/"}, "url must hold no password"),
        ({"name": "http", "url": "http://x/", "timeout_s": 0}, "timeout_s must be a number above 0"),
        ({"name": "http", "url": "http://x/", "retries": -1}, "retries must be an integer of at least 0"),
        ({"name": "http", "url": "http://x/", "token_env": "Bearer abc"}, "not the token itself"),
        ({"name": "custom", "function": "no_colon"}, "'package.module:function' or 'path/to/file.py:function'"),
        ({"name": "custom", "function": "no/such/file.py:fn"}, "there is no file no/such/file.py"),
    ],
)
def test_a_mistake_in_a_rewards_configuration_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_reward(config)


# --- the runner -------------------------------------------------------------------------------------------------------
