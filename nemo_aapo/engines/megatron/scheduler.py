"""Continuous batching as plain bookkeeping, without a model: which sequence has which row of the KV cache.

The life of a sequence (one completion of one prompt):

    waiting    It has no row yet. Prompts wait in the order in which they came, and so do completions of a prompt.
    admitted   ``admit`` gives it a row. In that step its prompt is prefilled, once for all completions of the prompt
               that enter together. Completions for which no row was free enter later and decode the prompt's last
               token again, on the keys and values that the cache kept.
    running    Each step samples one token of it (``record``) and, from its second step on, feeds the one before.
    finished   It sampled a stop token, completed a stop string or reached ``max_new_tokens``; the engine decides.
               ``retire`` frees its row at once for the next waiting sequence.

There is no preemption: a row has room for the longest sequence of the call, so a running sequence always finishes.

Invariant: rows ``0 .. running-1`` are taken and the others free, so that no step computes a row for nothing. ``retire``
fills gaps with rows from the end and says which keys and values have to move along; ``admit`` appends. Each row holds
its own sequence from position 0 on, and rows know nothing of each other.

    admit  ->  forward pass  ->  sample  ->  record  ->  retire  ->  admit ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NOTHING = np.zeros(0, np.int32)

MAX_PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, of one forward pass: bounds the activations when many prompts enter at once."""


def capacity(max_concurrent_tokens: int, longest: int, sequences: int) -> int:
    """Number of rows of the KV cache: what the budget pays for, and no more than there are sequences.

    Args:
        max_concurrent_tokens: the KV cache's size in tokens.
        longest: tokens of the longest possible sequence, prompt and completion.
        sequences: how many there are to generate.

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
    """Completions of one prompt that are admitted together, in rows ``start .. stop-1``.

    Example:
        Prompt 3 has 8 completions and 5 rows are free: ``Admission(prompt=3, start=11, stop=16, prefill=True,
        keep=True)``. When 3 more rows are free, ``Admission(3, start=13, stop=16, prefill=False, keep=False)``.
    """

    prompt: int
    start: int
    stop: int
    prefill: bool
    """True: the prompt goes through the model now. False: it did before, and its keys and values were kept."""
    keep: bool
    """More completions of the prompt are waiting, so the cache has to keep its keys and values."""


class Scheduler:
    """Waiting and running sequences of one ``generate`` call.

    Per row, ``running`` of them in use:
        ``prompt``, ``completion``: int64 [rows], which completion of which prompt the row holds.
        ``seed``: int64 [rows], the name of its random stream.
        ``length``: int64 [rows], tokens whose keys and values are in the cache.
        ``token``: int64 [rows], the token to feed next, at position ``length``.
        ``sampled``: int64 [rows], tokens sampled so far.
        ``inputs``: int64 [4, rows], the last four in one piece.
        ``tokens`` int32 and ``logprobs`` float32 [rows, max_new_tokens]: the completion so far.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], max_new_tokens: int, rows: int
    ) -> None:
        """
        Args:
            prompts: token ids of each, in the order in which they are admitted.
            seeds: one for each completion of each prompt.
            rows: see ``capacity``.
        """
        self.rows = rows
        self.running = 0
        self._columns = columns = np.zeros((6, rows), dtype=np.int64)
        self.prompt, self.completion, self.seed, self.length, self.token, self.sampled = columns
        self.inputs = columns[2:]
        self.tokens = np.zeros((rows, max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros((rows, max_new_tokens), dtype=np.float32)
        self.prompts: list[np.ndarray] = []
        """Token ids of each prompt; of those whose completions have all ended, none."""
        self._seeds: list[Sequence[int]] = []
        self._left: list[int] = []  # completions of each prompt that have not ended
        self._waiting: deque[int] = deque()
        self._admitted = 0  # completions of the first waiting prompt that have a row already
        self._prefilled = False  # its keys and values were kept
        self.add(prompts, seeds)

    @property
    def waiting(self) -> int:
        """Completions that have no row yet."""
        return sum(len(self._seeds[i]) for i in self._waiting) - self._admitted

    def add(self, prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> None:
        """More prompts, behind those that wait."""
        self._waiting.extend(len(self.prompts) + i for i in range(len(prompts)) if len(seeds[i]))
        self.prompts += prompts
        self._seeds += seeds
        self._left += map(len, seeds)

    def forget_kept(self) -> None:
        """The keys and values that were kept of a prompt are not to be used: its completions left prefill it again."""
        self._prefilled = False

    def admit(self) -> list[Admission]:
        """Give the free rows to waiting sequences.

        Rows whose prompt was kept come first: like the rows that were running before, they decode in this step. The
        others, at the end, are prefilled in it.
        """
        admissions: list[Admission] = []
        padded = prefilled = 0
        while self._waiting and self.running < self.rows:
            i = self._waiting[0]
            prefill = not self._prefilled
            if prefill:
                padded = max(padded, len(self.prompts[i]))
                prefilled += 1
                if prefilled > 1 and prefilled * padded > MAX_PREFILL_TOKENS:
                    break
            start, stop = self.running, min(self.running + len(self._seeds[i]) - self._admitted, self.rows)
            self._fill_rows(i, start, stop, prefill)
            self._admitted += stop - start
            self._prefilled = keep = self._admitted < len(self._seeds[i])
            if not keep:
                self._waiting.popleft()
                self._admitted = 0
            admissions.append(Admission(i, start, stop, prefill, keep))
        return admissions

    def _fill_rows(self, i: int, start: int, stop: int, prefill: bool) -> None:
        prompt = self.prompts[i]
        self.prompt[start:stop] = i
        completions = range(self._admitted, self._admitted + stop - start)
        self.completion[start:stop] = completions
        self.seed[start:stop] = [self._seeds[i][j] for j in completions]
        # A kept prompt decodes its last token again: its keys and values were kept, its logits were not.
        self.length[start:stop] = len(prompt) if prefill else len(prompt) - 1
        self.token[start:stop] = prompt[-1]
        self.sampled[start:stop] = 0
        self.running = stop

    def record(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, decoded: int) -> None:
        """Append a token to running sequences.

        Args:
            rows: int64 [n], ascending. tokens: int [n]. logprobs: float [n].
            decoded: number of rows, from the first, that fed a token in this step; the rest were prefilled.
        """
        at = rows, self.sampled[rows]
        self.tokens[at] = self.token[rows] = tokens
        self.logprobs[at] = logprobs
        self.sampled[rows] += 1
        self.length[rows[rows < decoded]] += 1

    def retire(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Free the rows of finished sequences, and close the gaps with running rows from the end.

        Args:
            rows: int64, ascending.

        Returns:
            source, target: int64 of equal length, the rows whose keys and values have to be copied.
        """
        for i in self.prompt[rows].tolist():
            self._left[i] -= 1
            if not self._left[i]:  # a call in flight may go on for as long as a run
                self.prompts[i], self._seeds[i] = _NOTHING, ()
        staying = np.delete(np.arange(self.running), rows)
        self.running = len(staying)
        source = staying[staying >= self.running]
        target = rows[rows < self.running]
        for column in (*self._columns, self.tokens, self.logprobs):
            column[target] = column[source]
        return source, target


class TokenVersions:
    """Which version sampled which tokens of running sequences, where new weights come between two steps.

    All rows change at the same step, so a few numbers a row suffice.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def changed(self, scheduler: Scheduler, before: int) -> None:
        """What the running sequences have so far was sampled by version ``before`` or earlier ones."""
        for row in range(scheduler.running):
            sequence = int(scheduler.prompt[row]), int(scheduler.completion[row])
            self._before.setdefault(sequence, []).append((int(scheduler.sampled[row]), before))

    def ended(self, i: int, j: int, length: int, version: int) -> tuple[int, np.ndarray | None]:
        """Of completion j of prompt i, which has ended with so many tokens while the weights are of ``version``.

        Returns:
            The version of its first token; and int32 [length], that of each, or None if it is the same for all.
        """
        versions = np.full(length, version, np.int32)
        for tokens, earlier in reversed(self._before.pop((i, j), [])):
            versions[:tokens] = earlier
        first = int(versions[0]) if length else version
        return first, versions if length and first != version else None


def contents(scheduler: Scheduler, row: int) -> np.ndarray:
    """The tokens of a row whose keys and values are in the cache: all but the last one sampled."""
    sampled = scheduler.tokens[row, : scheduler.sampled[row] - 1]
    return np.concatenate([scheduler.prompts[scheduler.prompt[row]], sampled])
