"""Rewards for form, length and repetition, rewards built from their configuration, and any reward on broken text."""

from __future__ import annotations

import math
import random

import pytest

from nemo_aapo.rewards import REWARDS, build_reward, reward_config
from tests.rewards.judging import completion, judge, mutate, prompt


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
