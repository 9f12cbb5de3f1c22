"""Lossless speculation: several tokens of a sequence in one forward pass, guessed from what was said before.

A pass has a price that does not depend on how many tokens go through it. So a row feeds guesses behind its token: what
followed the same few tokens earlier, in the prompt, in this completion or in others of the prompt (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding). The pass gives logits after each of them, and from each the one
token that its seed, its position and the vocabulary entry decide (``sampling``). A draft is accepted if it is the very
token that was sampled before it; the first that is not ends the row's step. So the tokens are those of decoding one by
one, at any temperature: nothing is accepted that would not have been sampled, and no random number is spent on drafts.

Nothing is fed that is not expected to pay. Each guess is one of eight levels, by how often in a row the same context
was followed by the same token; and whether a guess would have been right is seen for every token that is sampled, fed
or not. From both follows how many drafts raise the tokens per cost of a pass, and without any the pass is a plain one.
All of this counts tokens and no time, and is forgotten after the call: completions have the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nemo_aapo.engines.megatron.scheduler import Scheduler

PASS_TOKENS = 32
"""What a forward pass costs besides its tokens, in tokens. Measured on a CPU for 1 to 64 rows of models of 0.3M to 19M
parameters, whose size makes little difference: a draft costs 0.2 of a row's token with 8 rows, 0.4 with 16, 0.6 with 64
(docs/results/notebook.md)."""

MIN_GAIN = 1.1
"""Drafts are fed if they are expected to make a pass so many times as productive: finding them takes time, too."""

MAX_DRAFTS = 8
"""Drafts of a row in one pass."""

CONTEXT = 4
"""Tokens that a guess goes by; fewer where so many don't fit into 63 bits."""

MAX_ENTRIES = 1 << 20
"""Contexts that are remembered (4 MiB); beyond that they overwrite one another."""

_LEVEL_BITS = 3
_TOP = (1 << _LEVEL_BITS) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Feed:
    """What the running rows feed in one pass, and which logits they want of it.

    Example:
        Row 0 feeds its token 7 with drafts 8 and 9, row 1 its token 5; row 2 is prefilled: ``Feed(tokens=[7, 8, 9, 5],
        widths=[3, 1, 1], decoding=2)``. If the pass samples 8, 4, 6, 2, 1, row 0 gets 8 and 4: ``accepted`` is
        [2, 1, 1].
    """

    tokens: np.ndarray
    """int64 [D], of the decoding rows, row by row: its token, then its drafts."""
    widths: np.ndarray
    """int64 [running], how many tokens each row has logits for: those that it feeds; 1 for a prefilled one."""
    decoding: int
    """Number of decoding rows; the prefilled ones come after them."""

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [logits], the row that each logit vector belongs to."""
        return np.repeat(np.arange(len(self.widths)), self.widths)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [running], where each row's logits begin."""
        return np.cumsum(self.widths) - self.widths

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [logits], how many tokens of the row come before in this pass."""
        return np.arange(len(self.rows)) - self.starts[self.rows]

    def accepted(self, sampled: np.ndarray) -> np.ndarray:
        """How many of the sampled tokens each row gets: those up to the first that differs from the draft fed next.

        Args:
            sampled: [logits], the token after each fed one.

        Returns:
            int64 [running], 1 or more.
        """
        counts = np.ones_like(self.widths)
        open_rows = np.flatnonzero(self.widths > 1)
        while len(open_rows):
            at = self.starts[open_rows] + counts[open_rows]
            right = open_rows[sampled[at - 1] == self.tokens[at]]
            counts[right] += 1
            open_rows = right[self.widths[right] > counts[right]]
        return counts


def plain(scheduler: Scheduler, decoding: int) -> Feed:
    """One token of each decoding row."""
    return Feed(scheduler.token[:decoding], np.ones(scheduler.running, np.int64), decoding)


class Speculation:
    """The drafts of one ``generate`` call. A function of prompts and tokens, hence the same on all ranks."""

    def __init__(
        self,
        scheduler: Scheduler,
        prompts: Sequence[np.ndarray],
        completions: Sequence[int],
        max_new_tokens: int,
        vocab_size: int,
    ) -> None:
        """
        Args:
            scheduler: of the call.
            prompts: token ids of each. completions: how many each has.
            max_new_tokens: of a completion.
        """
        self.drafted = self.accepted = 0
        """Drafts that were fed, and those of them whose token a completion got."""
        self._scheduler, self._limit = scheduler, max_new_tokens
        self._token_bits = max(1, (vocab_size - 1).bit_length())
        self._context = min(CONTEXT, 63 // self._token_bits)
        self._mask = (1 << self._context * self._token_bits) - 1
        tokens = sum(map(len, prompts)) + sum(completions) * max_new_tokens
        entry_bits = min(4 * tokens, MAX_ENTRIES).bit_length()
        self._shift = np.uint64(64 - entry_bits)
        self._table = np.zeros(1 << entry_bits, np.int32)  # guess << 3 | level; level 0: nothing was seen
        self._right = np.zeros((_TOP + 1) * 2, np.int64)  # guesses by level: wrong, right
        self._first = np.cumsum(completions) - completions
        ends = self._remember_prompts(prompts)
        self._key = np.repeat(ends, completions)  # of each sequence, its last tokens
        self._at = self._entry(self._key, np.repeat(np.arange(len(prompts)), completions))

    def _remember_prompts(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Take the prompts' tokens as guesses after those before them; int64 [prompts], the key at each one's end."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if not lengths.sum():
            return lengths
        tokens = np.concatenate(prompts).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(tokens)) - np.repeat(starts, lengths)
        keys = np.zeros_like(tokens)
        for back in range(self._context):
            earlier = np.roll(tokens, back) << back * self._token_bits
            keys |= np.where(place >= back, earlier, 0)
        inner = np.flatnonzero(place > 0)
        at = self._entry(keys[inner - 1], np.repeat(np.arange(len(prompts)), lengths)[inner])
        self._table[at] = tokens[inner] << _LEVEL_BITS | 1
        return keys[starts + lengths - 1]

    def _entry(self, keys: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Where the table has the guess after some tokens of some prompts' completions; Fibonacci hashing."""
        return ((keys.view(np.uint64) + prompts.view(np.uint64) * _GOLDEN) * _GOLDEN >> self._shift).view(np.int64)

    def learn(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """See a token of each of some rows, int64 [n], before other rows take their place."""
        prompts = self._scheduler.prompt[rows]
        sequences = self._first[prompts] + self._scheduler.completion[rows]
        at = self._at[sequences]
        entries = self._table[at]
        level, right = entries & _TOP, entries >> _LEVEL_BITS == tokens
        self._right += np.bincount(level * 2 + right, minlength=len(self._right))
        self._table[at] = tokens << _LEVEL_BITS | np.where(right, np.minimum(level + 1, _TOP), 1)
        self._key[sequences] = keys = (self._key[sequences] << self._token_bits | tokens) & self._mask
        self._at[sequences] = self._entry(keys, prompts)

    def feed(self, decoding: int) -> Feed:
        """The tokens of the decoding rows, with those drafts behind them that are expected to pay."""
        scheduler = self._scheduler
        rows, room = np.arange(decoding), self._limit - 1 - scheduler.sampled[:decoding]
        prompts = scheduler.prompt[:decoding]
        sequences = self._first[prompts] + scheduler.completion[:decoding]
        wrong, right = self._right[::2], self._right[1::2]
        chances = (right + 1.0) / (wrong + right + 2.0)
        chances[0] = 0.0
        entries = self._table[self._at[sequences]]
        chance = chances[entries & _TOP]
        worth = scheduler.running / (PASS_TOKENS + scheduler.running)  # tokens that a plain pass yields for its cost
        keys = self._key[sequences]
        drafts = np.empty((decoding, MAX_DRAFTS), np.int64)
        expected = np.zeros((decoding, MAX_DRAFTS))
        for k in range(MAX_DRAFTS):
            going = (chance > worth) & (room > k)
            if not going.any():
                break
            rows, chance, entries, keys, room, prompts = (
                x[going] for x in (rows, chance, entries, keys, room, prompts)
            )
            drafts[rows, k] = guess = (entries >> _LEVEL_BITS).astype(np.int64)
            expected[rows, k] = chance
            keys = (keys << self._token_bits | guess) & self._mask
            entries = self._table[self._entry(keys, prompts)]
            chance = chance * chances[entries & _TOP]
        least = _least_chance(expected[expected > 0], scheduler.running)
        if least is None:
            return plain(scheduler, decoding)
        chosen = expected >= least
        widths = np.ones(scheduler.running, np.int64)
        widths[:decoding] += chosen.sum(1)
        fed = np.concatenate([scheduler.token[:decoding, None], drafts], axis=1)
        self.drafted += int(chosen.sum())
        return Feed(fed[np.insert(chosen, 0, True, axis=1)], widths, decoding)


def _least_chance(chances: np.ndarray, running: int) -> float | None:
    """The chance that a draft must have to be fed, for the most tokens by cost of a pass; None: no drafts pay.

    Args:
        chances: float64 [n], the drafts' chances to be accepted.
        running: rows, each of which yields a token without drafts.
    """
    if not len(chances):
        return None
    best = -np.sort(-chances)
    yields = running + np.cumsum(best)
    rates = yields / (PASS_TOKENS + running + np.arange(1, len(best) + 1))
    top = int(rates.argmax())
    if rates[top] < MIN_GAIN * running / (PASS_TOKENS + running):
        return None
    return float(best[top])
