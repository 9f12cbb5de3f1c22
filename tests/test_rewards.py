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
        ({"name": "custom", "function": "no_colon"}, "'package.module:function' or 'path/to/file.py:function'"),
        ({"name": "custom", "function": "no/such/file.py:fn"}, "there is no file no/such/file.py"),
    ],
)
def test_a_mistake_in_a_rewards_configuration_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_reward(config)


# --- the runner -------------------------------------------------------------------------------------------------------
