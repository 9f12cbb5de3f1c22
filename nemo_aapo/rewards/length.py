"""The cosine reward: right answers earn less, and wrong ones lose less, the longer they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.exact import Exact, Integer
from nemo_aapo.rewards.math import Accuracy
from nemo_aapo.types import Completion, Prompt

_VERIFIERS: dict[str, Reward] = {verifier.kind: verifier for verifier in (Accuracy(), Exact(), Integer())}


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
    verifier: Literal["accuracy", "exact", "integer"] = "accuracy"
    """The reward that tells right (above 0) from wrong."""

    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"reward 'cosine': max_tokens must be an integer of at least 1, not {self.max_tokens!r}")
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
