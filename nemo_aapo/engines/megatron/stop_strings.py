"""Stop strings on a stream of tokens, found in decoded text at the price of decoding a few tokens now and then.

Tokens and strings don't line up. A string may begin and end in the middle of tokens, a character may be spread over
several byte tokens, and a token's text can depend on its neighbours. So strings are looked for in the text of the last
few tokens together. This need not be done after each token: only a token that has a string's last character, or part
of a character, can complete the string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

_UNKNOWN, _HARMLESS, _MAY_COMPLETE = 0, 1, 2
_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Tokenizers decode an incomplete character to this one."""
_MARGIN = 8
"""Tokens before the string's that are decoded with it, as the first tokens of a piece may come out wrong without those
before them."""


class StopStrings:
    """Finds the rows whose text contains a stop string. A function of tokens alone, hence the same on all ranks."""

    def __init__(self, strings: Sequence[str], decode: Callable[[np.ndarray], str], vocab_size: int) -> None:
        """
        Args:
            strings: the stop strings; none is empty.
            decode: token ids int [n] -> text.
            vocab_size: the tokenizer's.

        Raises:
            ValueError: an empty string, which every text contains.
        """
        if not all(strings):
            raise ValueError(f"stop_strings {list(strings)}: an empty string would end every completion at once")
        self.strings = tuple(strings)
        self._decode = decode
        # Each token but padding stands for at least one byte of text.
        self._tail = max(len(string.encode()) for string in strings) + _MARGIN
        self._last_characters = {string[-1] for string in strings}
        self._kind = np.full(vocab_size, _UNKNOWN, dtype=np.int8)

    def found(self, tokens: np.ndarray, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Find the rows whose last token completed a stop string.

        Args:
            tokens: int32 [rows, limit], the completions so far.
            lengths: int64 [rows], how many tokens each completion has.
            last: int64 [rows], the last token of each.

        Returns:
            bool [rows]
        """
        for token in np.unique(last[self._kind[last] == _UNKNOWN]):
            self._kind[token] = _MAY_COMPLETE if self._may_complete(token) else _HARMLESS
        stopped = np.zeros(len(last), dtype=bool)
        for row in np.flatnonzero(self._kind[last] == _MAY_COMPLETE):
            tail = tokens[row, max(0, lengths[row] - self._tail) : lengths[row]]
            text = self._decode(tail)
            if any(string in text for string in self.strings):
                before = self._decode(tail[:-1])  # may have one already, from before ``min_new_tokens``
                stopped[row] = any(_times(string, text) > _times(string, before) for string in self.strings)
        return stopped

    def _may_complete(self, token: int) -> bool:
        """Whether a string's last character can come from this token. White space always can: some tokenizers strip it
        from a token that is decoded alone."""
        text = self._decode(np.array([token]))
        return _CUT_CHARACTER in text or any(last in text or last.isspace() for last in self._last_characters)


def _times(string: str, text: str) -> int:
    """How often the text contains the string, overlaps counted."""
    return len(re.findall(f"(?={re.escape(string)})", text))
