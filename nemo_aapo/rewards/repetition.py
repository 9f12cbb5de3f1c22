"""A penalty for text that repeats itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt


@dataclass(frozen=True)
class Repetition(Reward):
    """From 0.0 to -1.0: minus the share of the n-grams of words that were there before.

    arXiv 2502.03373, appendix C.2. 0.0 for a text of fewer words than one n-gram has.
    """

    ngram_size: int = 3

    kind: ClassVar[str] = "repetition"

    def __post_init__(self) -> None:
        if isinstance(self.ngram_size, bool) or not isinstance(self.ngram_size, int) or self.ngram_size < 1:
            raise ValueError(
                f"reward 'repetition': ngram_size must be an integer of at least 1, not {self.ngram_size!r}"
            )

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
