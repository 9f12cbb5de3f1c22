"""Lossless speculation: several tokens of a sequence in one forward pass, guessed from what was said before.

A pass has a price that does not depend on how many tokens go through it. So a row feeds guesses behind its token: what
followed the same few tokens earlier, in the prompt, in this completion or in others of the prompt (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding). The pass gives logits after each of them, and from each the one
token that its seed, its position and the vocabulary entry decide (``sampling``). A draft is accepted if it is the very
token that was sampled before it; the first that is not ends the row's step. So the tokens are those of decoding one by
one, at any temperature: nothing is accepted that would not have been sampled, and no random number is spent on drafts.

Nothing is fed that is not expected to pay. Each guess has a level, which rises where the same tokens are followed by
the same one again and falls where they are not; and whether a guess would have been right is seen for every token that
is sampled, fed or not. So the chance of each draft is known before it is fed, and it is fed if the passes that it saves
are worth more than it costs. While nothing is fed, this looks at the tokens every few steps only, so that looking costs
little. It counts tokens and no time, and forgets all after the call: completions have the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aapo.engines.megatron.scheduler import Scheduler

PASS_TOKENS = 32
"""What a forward pass costs besides its tokens, in tokens. Measured on a CPU for 1 to 64 rows of models of 0.3M to 19M
parameters, whose size makes little difference (docs/results/notebook.md)."""

DRAFT_TOKENS = 1.5
"""What a draft costs, in tokens: its attention is padded, and its row's keys and values may have to be gathered."""

DRAFTING_TOKENS = 12
"""What it costs that a pass has drafts at all, in tokens."""

MAX_LEAD = 16
"""With no sequence waiting, the row furthest behind decides when all is done. Rows so far ahead of it don't draft."""

MAX_DRAFTS = 8
"""Drafts of a row in one pass."""

CONTEXT = 3
"""Tokens that a guess goes by; fewer where so many don't fit into 63 bits."""

MAX_ENTRIES = 1 << 20
"""Contexts that are remembered (4 MiB); beyond that they overwrite one another."""

MAX_PAUSE = 16
"""Steps between two looks at the tokens while nothing is fed, at most."""

_LEVEL_BITS = 3
_TOP = (1 << _LEVEL_BITS) - 1
_DOUBT = 3  # levels that a wrong guess loses
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Feed:
    """What the running rows feed in one pass, and whose logits it gives.

    Example:
        Row 0 feeds its token 7 with drafts 8 and 9, row 1 its token 5; row 2 is prefilled: ``tokens=[7, 5, 8, 9],
        drafts=[2, 0], running=3, rows=[0, 1, 0, 0, 2], offsets=[0, 0, 1, 2, 0]``. If the pass samples 8, 2, 4, 6, 1,
        row 0 gets 8 and 4: ``accepted`` is [2, 1, 1].
    """

    tokens: np.ndarray
    """int64 [D], the token of each decoding row, then the drafts, row by row."""
    drafts: np.ndarray
    """int64 [decoding rows], how many drafts each has."""
    running: int
    """Number of rows; prefilled ones come after those that decode."""
    rows: np.ndarray
    """int64 [L], the row that each of the L logit vectors belongs to."""
    offsets: np.ndarray
    """int64 [L], how many tokens of the row come before in this pass."""

    @classmethod
    def of(cls, scheduler: Scheduler, drafts: np.ndarray, tokens: np.ndarray) -> Feed:
        """A token of each decoding row, and drafts: ``drafts`` as above, ``tokens`` int64 [their number]."""
        decoding, rows = len(drafts), np.arange(scheduler.running)
        first, offsets = scheduler.token[:decoding], np.zeros_like(rows)
        if len(tokens):
            drafting = rows[:decoding].repeat(drafts)
            behind = np.arange(len(tokens)) - (np.cumsum(drafts) - drafts)[drafting] + 1
            rows = np.insert(rows, decoding, drafting)
            offsets = np.insert(offsets, decoding, behind)
            first = np.concatenate([first, tokens])
        return cls(first, drafts, scheduler.running, rows, offsets)

    def at(self, rows: np.ndarray, offset: int) -> np.ndarray:
        """int64 [n], where the logits of some rows' tokens are, the same number of tokens into each row."""
        decoding = len(self.drafts)
        if offset:
            return decoding + (np.cumsum(self.drafts) - self.drafts)[rows] + offset - 1
        return np.where(rows < decoding, rows, rows + len(self.tokens) - decoding)

    def accepted(self, sampled: np.ndarray) -> np.ndarray:
        """How many of the sampled tokens each row gets: those up to the first that differs from the draft fed next.

        Args:
            sampled: [L], the token after each fed one.

        Returns:
            int64 [running], 1 or more.
        """
        counts, taken = np.ones(self.running, np.int64), 0
        rows = np.flatnonzero(self.drafts)
        while len(rows):
            rows = rows[sampled[self.at(rows, taken)] == self.tokens[self.at(rows, taken + 1)]]
            taken += 1
            counts[rows] += 1
            rows = rows[self.drafts[rows] > taken]
        return counts


def plain(scheduler: Scheduler, decoding: int) -> Feed:
    """One token of each decoding row."""
    return Feed.of(scheduler, np.zeros(decoding, np.int64), np.zeros(0, np.int64))


class Speculation:
    """The drafts of one ``generate`` call. A function of prompts and tokens, hence the same on all ranks."""

    def __init__(
        self, scheduler: Scheduler, prompts: Sequence[np.ndarray], completions: Sequence[int], vocab_size: int
    ) -> None:
        """
        Args:
            scheduler: of the call.
            prompts: token ids of each. completions: how many each has.
        """
        self.drafted = self.accepted = 0
        """Drafts that were fed, and those of them that a completion got."""
        self._scheduler, self._limit = scheduler, scheduler.tokens.shape[1]
        self._token_bits = max(1, (vocab_size - 1).bit_length())
        self._context = min(CONTEXT, 63 // self._token_bits)
        tokens = sum(map(len, prompts)) + sum(completions) * self._limit
        entry_bits = min(2 * tokens, MAX_ENTRIES - 1).bit_length()
        self._shift = np.uint64(64 - entry_bits)
        self._table = np.zeros(1 << entry_bits, np.int32)  # guess << 3 | level; level 0: nothing was seen
        self._chances = np.zeros(_TOP + 1)  # of a guess to be right, by its level
        self._guesses = np.zeros((_TOP + 1) * 2, np.int64)  # by level: wrong, right
        self._first = np.cumsum(completions) - completions
        self._seen = np.zeros(sum(completions), np.int64)  # tokens of each completion that were learned from
        self._steps = self._next_look = 0
        self._pause = 1  # steps from a look to the next one
        # [prompts, context]: what a completion's first tokens come after
        self._tails = np.zeros((len(prompts), self._context), np.int64)
        for tail, prompt in zip(self._tails, prompts, strict=True):
            tail[max(0, self._context - len(prompt)) :] = prompt[-self._context :]
        self._remember_prompts(prompts)

    def _remember_prompts(self, prompts: Sequence[np.ndarray]) -> None:
        """Take the prompts' tokens as guesses after those before them."""
        lengths = [len(prompt) for prompt in prompts]
        if sum(lengths) > self._context:
            names = np.repeat(np.arange(len(prompts)), lengths)
            tokens = np.concatenate(prompts).astype(np.int64)
            following = np.arange(self._context, len(tokens))
            following = following[names[following - self._context] == names[following]]
            at = self._entries(self._keys(tokens)[following - self._context], names[following])
            self._table[at] = tokens[following] << _LEVEL_BITS | 1

    def _keys(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [..., n] tokens -> [..., n - context + 1], one number for each ``context`` neighbours."""
        count = tokens.shape[-1] - self._context + 1
        keys = tokens[..., :count].copy()
        for first in range(1, self._context):
            keys <<= self._token_bits
            keys |= tokens[..., first : first + count]
        return keys

    def _entries(self, keys: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Where the table has the guess after ``keys``'s tokens in completions of ``prompts``: a Fibonacci hash."""
        mixed = keys.view(np.uint64) + prompts.view(np.uint64) * _GOLDEN
        return ((mixed ^ mixed >> np.uint64(32)) * _GOLDEN >> self._shift).view(np.int64)

    def _recent(self, rows: np.ndarray, count: int) -> np.ndarray:
        """int64 [n, count]: the last tokens of some rows' completions, with the prompt's last ones before them."""
        scheduler = self._scheduler
        places = scheduler.sampled[rows, None] + np.arange(-count, 0)
        tails = np.maximum(places + self._context, 0)
        before = self._tails[scheduler.prompt[rows, None], np.minimum(tails, self._context - 1)]
        return np.where(places < 0, before, scheduler.tokens[rows[:, None], np.maximum(places, 0)])

    def learn(self, ending: np.ndarray) -> None:
        """See what the rows have sampled.

        Args:
            ending: int64 [n], rows that are about to be freed.
        """
        self._steps += 1
        if self._steps >= self._next_look:
            self._learn(np.arange(self._scheduler.running))
            if not self._pays():
                self._rest()
        elif len(ending):
            self._learn(ending)

    def _rest(self) -> None:
        """Nothing is fed after this look: the next one is in a while."""
        self._pause = min(2 * self._pause, MAX_PAUSE)
        self._next_look = self._steps + self._pause

    def _learn(self, rows: np.ndarray) -> None:
        scheduler = self._scheduler
        prompts, sampled = scheduler.prompt[rows], scheduler.sampled[rows]
        sequences = self._first[prompts] + scheduler.completion[rows]
        new = sampled - self._seen[sequences]
        self._seen[sequences] = sampled
        count = int(new.max(initial=0))
        if not count:
            return
        recent = self._recent(rows, count + self._context)
        row, column = np.nonzero(np.arange(count) >= count - new[:, None])
        at = self._entries(self._keys(recent)[row, column], prompts[row])
        tokens, entries = recent[row, column + self._context], self._table[at]
        level, right = entries & _TOP, entries >> _LEVEL_BITS == tokens
        # What was right often enough survives being wrong once: the others of a group say it again.
        kept, lower = right | (level > _DOUBT), np.where(level > _DOUBT, level - _DOUBT, 1)
        guesses = np.where(kept, entries >> _LEVEL_BITS, tokens)
        self._table[at] = guesses << _LEVEL_BITS | np.where(right, np.minimum(level + 1, _TOP), lower)
        self._guesses += np.bincount(level * 2 + right, minlength=len(self._guesses))
        wrong, right = self._guesses[2::2], self._guesses[3::2]
        self._chances[1:] = right / (wrong + right + 4.0)  # with few seen, rather too low: seeing more costs nothing

    def _pays(self) -> bool:
        """Whether any guess is good enough for the row that gains most."""
        scheduler = self._scheduler
        gain = PASS_TOKENS / (scheduler.running if scheduler.waiting else 1) + 1.0
        return bool(self._chances.max() * gain > DRAFT_TOKENS)

    def _gains(self, decoding: int) -> np.ndarray:
        """What an accepted draft of each decoding row saves, in tokens, float64 [decoding].

        It saves feeding its own token later; and of the price of a pass, the share that the row has in how many there
        will be. Where others wait for the row, all running rows have the same. Where none does, those that are ahead
        of others have less, and finally none.
        """
        scheduler = self._scheduler
        if scheduler.waiting:
            return np.full(decoding, PASS_TOKENS / scheduler.running + 1.0)
        sampled = scheduler.sampled[: scheduler.running]
        behind = np.searchsorted(np.sort(sampled), sampled[:decoding], side="right")
        return np.where(sampled[:decoding] > sampled.min() + MAX_LEAD, 0.0, PASS_TOKENS / behind + 1.0)

    def feed(self, decoding: int) -> Feed:
        """The tokens of the decoding rows, with those drafts behind them that are expected to pay."""
        scheduler = self._scheduler
        if not decoding or self._steps < self._next_look or not self._pays():
            return plain(scheduler, decoding)
        gains = self._gains(decoding)
        drafts, chances = self._drafts(gains)
        chosen = chances > 0.0
        if (chances * gains[:, None] - DRAFT_TOKENS)[chosen].sum() < DRAFTING_TOKENS:
            self._rest()
            return plain(scheduler, decoding)
        self._pause = 1
        self.drafted += int(chosen.sum())
        return Feed.of(scheduler, chosen.sum(1), drafts[chosen])

    def _drafts(self, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Guesses for the decoding rows, int64 [decoding, MAX_DRAFTS], and the chance that each is accepted, float64.

        A chance is the product of those of all guesses up to it. Where a draft would gain less than it costs, it is 0.
        """
        scheduler = self._scheduler
        rows = np.arange(len(gains))
        prompts, room = scheduler.prompt[rows], self._limit - 1 - scheduler.sampled[rows]
        keys = self._keys(self._recent(rows, self._context))[:, 0]
        mask = (1 << self._context * self._token_bits) - 1
        drafts, chances = np.zeros((len(gains), MAX_DRAFTS), np.int64), np.zeros((len(gains), MAX_DRAFTS))
        chance = np.ones(len(gains))
        for draft in range(MAX_DRAFTS):
            entries = self._table[self._entries(keys, prompts)]
            chance = chance * self._chances[entries & _TOP]
            going = np.flatnonzero((chance * gains[rows] > DRAFT_TOKENS) & (room > draft))
            if not len(going):
                break
            rows, prompts, room, keys = (x[going] for x in (rows, prompts, room, keys))
            chance = chance[going]
            guess = (entries[going] >> _LEVEL_BITS).astype(np.int64)
            drafts[rows, draft], chances[rows, draft] = guess, chance
            keys = (keys << self._token_bits | guess) & mask
        return drafts, chances
