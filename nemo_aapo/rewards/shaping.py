"""Rewards for the form of a completion: its tags, its length, its repetitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.matching import Exact, Integer, MultipleChoice
from nemo_aapo.rewards.math import Accuracy
from nemo_aapo.types import Completion, Prompt

Style = Literal["think_answer", "think"]
"""The tags that a prompt asks for, as AAPO's authors have them (github.com/JianxXiong/AAPO).

``think_answer``  <think> reasoning </think> <answer> answer </answer>     open-r1/utils/rewards.py
``think``         reasoning, a line with </think> alone, then the answer   open-rs/utils/rewards.py
"""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_END_LINE = "\n</think>\n"
_VERIFIERS: dict[str, Reward] = {
    verifier.kind: verifier for verifier in (Accuracy(), Exact(), Integer(), MultipleChoice())
}


@dataclass(frozen=True)
class Format(Reward):
    """1.0 if the completion is well-formed, else 0.0.

    In the style ``think_answer`` it is one think block and one answer block with nothing but white space around them;
    a prompt that ends in ``<think>``, as some chat templates write it, has opened the first block already. In the style
    ``think``, whose prompts always do, exactly one line is ``</think>``.
    """

    style: Style = "think_answer"

    kind: ClassVar[str] = "format"

    def __post_init__(self) -> None:
        _check_style(self.kind, self.style)

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        if self.style == "think":
            return float(text.count(_END_LINE) == 1)
        return float(_is_well_formed(_opening(prompt) + text))


@dataclass(frozen=True)
class TagCount(Reward):
    """The share of the style's tags that are there exactly once: of two tags in ``think``, of four in the other."""

    style: Style = "think_answer"

    kind: ClassVar[str] = "tag_count"

    def __post_init__(self) -> None:
        _check_style(self.kind, self.style)

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """The share, 0.0 to 1.0."""
        text = _opening(prompt) + text
        tags = ("<think>\n", _END_LINE) if self.style == "think" else _TAGS
        return sum(text.count(tag) == 1 for tag in tags) / len(tags)


def _check_style(kind: str, style: str) -> None:
    if style not in get_args(Style):
        raise ValueError(f"reward {kind!r}: style must be one of {', '.join(get_args(Style))}, not {style!r}")


def _opening(prompt: Prompt) -> str:
    """What the prompt has opened for the completion, with the line break behind it."""
    stripped = prompt.text.rstrip()
    return prompt.text[len(stripped) - len("<think>") :] if stripped.endswith("<think>") else ""


def _is_well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think, end_think, answer, end_answer = (text.index(tag) for tag in _TAGS)
    between = text[end_think + len("</think>") : answer]
    around = text[:think] + text[end_answer + len("</answer>") :]
    return think < end_think < answer < end_answer and not between.strip() and not around.strip()


@dataclass(frozen=True)
class Cosine(Reward):
    """A value that moves with the length: ``*_short`` at 0 tokens, ``*_long`` from ``max_tokens`` on.

    v = long + (short - long) / 2 * (1 + cos(pi * min(length, max_tokens) / max_tokens)), the second reward of AAPO's
    R1-Distill run (arXiv 2505.14264). Its authors count characters and don't clamp, which makes the reward rise again
    behind the limit; here the length is the number of completion tokens.
    """

    max_tokens: int
    """The length at which the reward stops changing: the run's limit on completion tokens."""
    correct_short: float = 1.0
    correct_long: float = 0.5
    wrong_short: float = -0.5
    wrong_long: float = 0.0
    verifier: Literal["accuracy", "exact", "integer", "multiple_choice"] = "accuracy"
    """The reward that tells right (above 0) from wrong."""

    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        _check_count(self.kind, "max_tokens", self.max_tokens)
        for key in ("correct_short", "correct_long", "wrong_short", "wrong_long"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"reward 'cosine': {key} must be a finite number, not {value!r}")
        if self.verifier not in _VERIFIERS:
            raise ValueError(f"reward 'cosine': verifier must be one of {sorted(_VERIFIERS)}, not {self.verifier!r}")

    @property
    def in_process(self) -> bool:
        """True if the verifier may."""
        return _VERIFIERS[self.verifier].in_process

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Between short and long, by correctness."""
        correct = _VERIFIERS[self.verifier](prompt, text, completion) > 0
        short, long = (self.correct_short, self.correct_long) if correct else (self.wrong_short, self.wrong_long)
        share = min(len(completion.token_ids), self.max_tokens) / self.max_tokens
        return long + (short - long) / 2 * (1 + math.cos(math.pi * share))

    def check_answer(self, answer: str) -> None:
        """Ask the verifier."""
        _VERIFIERS[self.verifier].check_answer(answer)

    def depends_on(self) -> dict[str, Any]:
        """What the verifier's values depend on."""
        return _VERIFIERS[self.verifier].depends_on()

    def load(self) -> None:
        """Load the verifier."""
        _VERIFIERS[self.verifier].load()


@dataclass(frozen=True)
class Overlong(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), from 0.0 to -1.0.

    0 up to ``max_tokens - buffer_tokens`` completion tokens, from there down a line to -1 at ``max_tokens``.
    """

    max_tokens: int
    """The run's limit on completion tokens."""
    buffer_tokens: int
    """How many tokens before that limit the punishment begins."""

    kind: ClassVar[str] = "overlong"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "buffer_tokens"):
            _check_count(self.kind, name, getattr(self, name))
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"reward 'overlong': buffer_tokens={self.buffer_tokens} is more than max_tokens={self.max_tokens}"
            )

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """0.0 for completions that are short enough."""
        excess = len(completion.token_ids) - (self.max_tokens - self.buffer_tokens)
        return -min(max(excess / self.buffer_tokens, 0.0), 1.0)


@dataclass(frozen=True)
class Repetition(Reward):
    """Minus the share of the n-grams of words that were there before: 0.0 (no repetition) to -1.0.

    arXiv 2502.03373, appendix C.2. It is 0.0 for a text of fewer words than one n-gram has.
    """

    ngram_size: int = 3

    kind: ClassVar[str] = "repetition"

    def __post_init__(self) -> None:
        _check_count(self.kind, "ngram_size", self.ngram_size)

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """The share of distinct n-grams, less one."""
        words = text.lower().split()
        if len(words) < self.ngram_size:
            return 0.0
        numbers: dict[str, int] = {}
        ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
        # Pairs of neighbours are numbered, then pairs of those: a word more each time.
        grams = ids
        for offset in range(1, self.ngram_size):
            pairs = grams[:-1] * len(numbers) + ids[offset:]
            grams = np.unique(pairs, return_inverse=True)[1] if offset < self.ngram_size - 1 else pairs
        return float(len(np.unique(grams)) / len(grams) - 1.0)


def _check_count(kind: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"reward {kind!r}: {name} must be an integer of at least 1, not {value!r}")
