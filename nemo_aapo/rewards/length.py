"""Rewards by length: the cosine of right and wrong answers, and DAPO's punishment of overlong ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.choice import MultipleChoice
from nemo_aapo.rewards.exact import Exact, Integer
from nemo_aapo.rewards.math import Accuracy
from nemo_aapo.types import Completion, Prompt

_VERIFIERS: dict[str, Reward] = {
    verifier.kind: verifier for verifier in (Accuracy(), Exact(), Integer(), MultipleChoice())
}


@dataclass(frozen=True)
class Cosine(Reward):
    """From ``*_short`` at length 0 along half a cosine to ``*_long`` at ``max_tokens``, and flat behind it.

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
        """As the verifier."""
        return _VERIFIERS[self.verifier].in_process

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Between short and long, by correctness."""
        correct = _VERIFIERS[self.verifier](prompt, text, completion) > 0
        short, long = (self.correct_short, self.correct_long) if correct else (self.wrong_short, self.wrong_long)
        share = min(len(completion.token_ids), self.max_tokens) / self.max_tokens
        return long + (short - long) / 2 * (1 + math.cos(math.pi * share))

    def check_answer(self, answer: str) -> None:
        """As the verifier."""
        _VERIFIERS[self.verifier].check_answer(answer)

    def depends_on(self) -> dict[str, Any]:
        """As the verifier."""
        return _VERIFIERS[self.verifier].depends_on()

    def load(self) -> None:
        """As the verifier."""
        _VERIFIERS[self.verifier].load()


@dataclass(frozen=True)
class Overlong(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), from 0.0 to -1.0.

    0 up to ``max_tokens - buffer_tokens`` completion tokens, from there down a line to -1 at ``max_tokens``.
    """

    max_tokens: int
    """The run's limit on completion tokens."""
    buffer_tokens: int
    """How long before it the punishment begins."""

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


def _check_count(kind: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"reward {kind!r}: {name} must be an integer of at least 1, not {value!r}")
