"""Which sequence sits in which row of the KV cache: continuous batching as plain bookkeeping, without a model.

Rows ``0 .. live-1`` are always taken and the others free, so that no step computes a dead row: ``retire`` fills the
gaps with rows from the end and says which keys and values have to move along, ``admit`` appends. Each row holds its
own sequence from position 0 on, and rows know nothing of each other.

    admit  ->  forward pass  ->  draw  ->  record  ->  retire  ->  admit ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, of one forward pass: bounds the activations when many prompts enter at once."""


def capacity(max_concurrent_tokens: int, longest: int, sequences: int) -> int:
    """Number of rows: what the budget pays for, and no more than there are sequences.

    Args:
        max_concurrent_tokens: the KV cache's size in tokens.
        longest: tokens of the longest possible sequence, prompt and completion.
        sequences: how many there are to draw.

    Raises:
        ValueError: the budget doesn't hold even one sequence.
    """
    if longest > max_concurrent_tokens:
        raise ValueError(
            f"a sequence of {longest} tokens (longest prompt + max_new_tokens) doesn't fit into "
            f"rollout.max_concurrent_tokens={max_concurrent_tokens}: raise it to at least {longest}, "
            "or lower data.max_prompt_tokens or rollout.max_new_tokens"
        )
    return min(max_concurrent_tokens // longest, sequences)


@dataclass(frozen=True, slots=True)
class Admission:
    """Completions of one prompt that enter together, in rows ``start .. stop-1``."""

    prompt: int
    start: int
    stop: int
    prefill: bool
    """True: the prompt goes through the model now. False: it did before, and its keys and values were kept."""
    keep: bool
    """More completions of the prompt wait for a row: keep its keys and values."""


class Slots:
    """Rows of the cache and the sequences in them.

    Per row, ``live`` of them in use:
        ``prompt``, ``completion``: int64 [rows], which completion of which prompt sits there.
        ``seed``: int64 [rows], the name of its random stream.
        ``length``: int64 [rows], tokens whose keys and values are in the cache.
        ``token``: int64 [rows], the token that comes next, at position ``length``.
        ``drawn``: int64 [rows], tokens drawn so far.
        ``inputs``: int64 [4, rows], the last four in one piece.
        ``tokens`` int32 and ``logprobs`` float32 [rows, max_new_tokens]: the completion so far.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], max_new_tokens: int, rows: int
    ) -> None:
        """
        Args:
            prompts: token ids of each, in the order in which they enter.
            seeds: one for each completion of each.
            rows: see ``capacity``.
        """
        self.rows = rows
        self.live = 0
        self._numbers = numbers = np.zeros((6, rows), dtype=np.int64)
        self.prompt, self.completion, self.seed, self.length, self.token, self.drawn = numbers
        self.inputs = numbers[2:]
        self.tokens = np.zeros((rows, max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros((rows, max_new_tokens), dtype=np.float32)
        self._prompts = prompts
        self._seeds = seeds
        self._waiting = deque(i for i in range(len(prompts)) if len(seeds[i]))
        self._entered = 0  # completions of the first waiting prompt that have a row already

    def admit(self) -> list[Admission]:
        """Give the free rows to waiting sequences.

        Rows whose prompt was kept come first: together with the rows that were live before they decode in this
        step. The others, at the end, are prefilled in it.
        """
        admissions: list[Admission] = []
        padded = prefilled = 0
        while self._waiting and self.live < self.rows:
            i = self._waiting[0]
            prefill = self._entered == 0
            if prefill:
                padded = max(padded, len(self._prompts[i]))
                prefilled += 1
                if prefilled > 1 and prefilled * padded > MAX_PREFILL_TOKENS:
                    break
            start, stop = self.live, min(self.live + len(self._seeds[i]) - self._entered, self.rows)
            self._seat(i, start, stop, prefill)
            self._entered += stop - start
            keep = self._entered < len(self._seeds[i])
            if not keep:
                self._waiting.popleft()
                self._entered = 0
            admissions.append(Admission(i, start, stop, prefill, keep))
        return admissions

    def _seat(self, i: int, start: int, stop: int, prefill: bool) -> None:
        prompt = self._prompts[i]
        self.prompt[start:stop] = i
        completions = range(self._entered, self._entered + stop - start)
        self.completion[start:stop] = completions
        self.seed[start:stop] = [self._seeds[i][j] for j in completions]
        # A kept prompt decodes its last token again, for the logits: they aren't kept.
        self.length[start:stop] = len(prompt) if prefill else len(prompt) - 1
        self.token[start:stop] = prompt[-1]
        self.drawn[start:stop] = 0
        self.live = stop

    def record(self, tokens: np.ndarray, logprobs: np.ndarray, decoded: int) -> None:
        """Take in what was drawn.

        Args:
            tokens: int [live]. logprobs: float [live].
            decoded: number of rows, from the first, that fed a token in this step; the rest were prefilled.
        """
        live = slice(self.live)
        at = np.arange(self.live), self.drawn[live]
        self.tokens[at] = self.token[live] = tokens
        self.logprobs[at] = logprobs
        self.drawn[live] += 1
        self.length[:decoded] += 1

    def retire(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Free rows, and close the gaps with live rows from the end.

        Args:
            rows: int64, ascending.

        Returns:
            source, target: int64 of equal length, the rows whose keys and values have to be copied.
        """
        staying = np.delete(np.arange(self.live), rows)
        self.live = len(staying)
        source = staying[staying >= self.live]
        target = rows[rows < self.live]
        for column in (*self._numbers, self.tokens, self.logprobs):
            column[target] = column[source]
        return source, target
