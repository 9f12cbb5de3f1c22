"""Stop strings on a stream of tokens: looked for in text, at the price of a few tokens' decoding now and then.

Tokens and strings don't line up. A string may begin and end in the middle of tokens, a character may be cut over
several byte tokens, and what a token says can depend on its neighbours. So the text is what counts: that of the last
few tokens together. And it need not be looked at after each token: a string is completed by a token that has its last
character, or part of a character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_UNKNOWN, _HARMLESS, _MAY_COMPLETE = 0, 1, 2
_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode an incomplete character to."""
_MARGIN = 8
"""Tokens before the string's that are decoded along: the first ones may come out wrong without what precedes them."""


class StopStrings:
    """Finds the rows whose text contains one of some strings. The same on all ranks: a function of their tokens."""

    def __init__(self, strings: Sequence[str], decode: Callable[[np.ndarray], str], vocab_size: int) -> None:
        """
        Args:
            strings: what to look for; none is empty.
            decode: token ids int [n] -> text.
            vocab_size: of the tokenizer.

        Raises:
            ValueError: an empty string, which every text contains.
        """
        if not all(strings):
            raise ValueError(f"stop_strings {list(strings)}: an empty string would end every completion at once")
        self.strings = tuple(strings)
        self._decode = decode
        # A token stands for at least one byte of text, special tokens apart.
        self._tail = max(len(string.encode()) for string in strings) + _MARGIN
        self._last_characters = {string[-1] for string in strings}
        self._kind = np.full(vocab_size, _UNKNOWN, dtype=np.int8)

    def found(self, tokens: np.ndarray, drawn: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Which rows end.

        Args:
            tokens: int32 [rows, limit], the completions so far, of which ``drawn`` int64 [rows] tokens are there.
            new: int64 [rows], the last token of each.

        Returns:
            bool [rows]
        """
        for token in np.unique(new[self._kind[new] == _UNKNOWN]):
            self._kind[token] = _MAY_COMPLETE if self._may_complete(token) else _HARMLESS
        stopped = np.zeros(len(new), dtype=bool)
        for row in np.flatnonzero(self._kind[new] == _MAY_COMPLETE):
            text = self._decode(tokens[row, max(0, drawn[row] - self._tail) : drawn[row]])
            stopped[row] = any(string in text for string in self.strings)
        return stopped

    def _may_complete(self, token: int) -> bool:
        """Whether a string's last character can be this token's. Some tokenizers strip a lone token's spaces."""
        text = self._decode(np.array([token]))
        return _CUT_CHARACTER in text or any(last in text or last.isspace() for last in self._last_characters)
