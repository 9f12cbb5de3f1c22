"""A prompt, a completion, and a reward's verdict on them."""

from __future__ import annotations

import random

import numpy as np

from nemo_aapo.rewards import build_reward
from nemo_aapo.types import Completion, Prompt

PIECES = ["", "\\boxed{", "}", "{", "\\", "$", "<think>", "</think>\n", "<answer>", "\ud800", "\x00", "9" * 40, "1,234"]
PIECES += ["\\frac{1}{", "\\left(", "^", "_", "(B)", "\u0661", "-", "%", "é\u202e", ".5.5", "\n"]


def prompt(answer: str = "72", text: str = "How many?") -> Prompt:
    return Prompt("id", np.arange(4, dtype=np.int32), text, answer, "data.jsonl:1")


def completion(tokens: int = 8, finish_reason: str = "stop") -> Completion:
    return Completion(np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), finish_reason, 0)


def judge(name: str, gold: str, text: str, **parameters) -> float:
    return build_reward({"name": name, **parameters})(prompt(gold), text, completion())


def mutate(text: str, rng: random.Random) -> str:
    """A few pieces put in or taken out."""
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice([*PIECES, text[:200]]) + text[start + rng.choice([0, 0, 1, 5, 30]) :]
    return text
