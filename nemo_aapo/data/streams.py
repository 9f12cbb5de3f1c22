"""The endless stream of one source's prompts: epoch after epoch, cut into steps that hold no prompt twice.

A stream is asked for positions [start, stop), those of one step. How many a step takes may change from step to step,
as where sources are mixed; ``step_at`` says which step a position belongs to.
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

Sampling = Literal["uniform", "hard", "medium"]
StepAt = Callable[[int], tuple[int, int]]
"""Position -> (start, stop) of the step that holds it."""


class Stream(Protocol):
    """Indices of one source's prompts."""

    def take(self, start: int, stop: int) -> list[int]:
        """The prompts of one step, all different."""

    def knows(self, start: int) -> bool:
        """Whether the prompts of the step that begins there are decided."""

    def observe(self, start: int, stop: int, results: Sequence[tuple[int, int, int]]) -> None:
        """Take in what came of a step: (index, right completions, completions that could be judged)."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, fit for JSON."""

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what ``state`` gave."""


class EndlessStream:
    """The prompts 0, 1, 2, ... of a source without end, each once."""

    def take(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))

    def knows(self, start: int) -> bool:
        return True

    def observe(self, start: int, stop: int, results: Sequence[tuple[int, int, int]]) -> None: ...

    def state(self) -> None: ...

    def load(self, state: dict[str, Any] | None) -> None: ...


class PermutedStream:
    """A permutation of all prompts each epoch; a pure function of the seed.

    A step that runs over an epoch's end takes the rest from the next one, whose order is changed just enough that the
    step holds no prompt twice.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, step_at: StepAt) -> None:
        """Begin with the first epoch.

        Args:
            size: number of prompts; no step takes more.
            seed: 0 <= seed < 2**63; with the epoch's number it names the permutation.
            shuffle: False takes the prompts in the file's order.
            step_at: the step that a position belongs to.
        """
        self.size, self._seed, self._shuffle, self._step_at = size, seed, shuffle, step_at
        self._tails: list[np.ndarray] = []
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def take(self, start: int, stop: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < stop - start:
            epoch, offset = divmod(start + len(taken), self.size)
            wanted = stop - start - len(taken)
            taken += self._order(epoch)[offset : offset + wanted].tolist()
        return taken

    def knows(self, start: int) -> bool:
        return True

    def observe(self, start: int, stop: int, results: Sequence[tuple[int, int, int]]) -> None: ...

    def state(self) -> None: ...

    def load(self, state: dict[str, Any] | None) -> None: ...

    def _compute_order(self, epoch: int) -> np.ndarray:
        """int64 [size], the order of an epoch."""
        # An epoch's order depends on the tail of the one before, so tails are kept from the first epoch on.
        while len(self._tails) < epoch:
            past = len(self._tails)
            order = self._arrange(past)
            border = (past + 1) * self.size
            used = border - self._step_at(border)[0]
            self._tails.append(order[self.size - used :])
        return self._arrange(epoch)

    def _arrange(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, with what the shared step already took kept out of that step's other half."""
        order = self._permutation(epoch)
        tail = self._tails[epoch - 1] if epoch else order[:0]
        if not len(tail):
            return order
        border = epoch * self.size
        free = np.flatnonzero(~np.isin(order, tail))[: self._step_at(border)[1] - border]
        return np.concatenate([order[free], np.delete(order, free)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.size)
        # Sorting raw words: NumPy promises the bit generator's stream for ever, but not Generator.permutation's.
        words = np.random.Philox(key=[self._seed, epoch]).random_raw(self.size)
        return np.argsort(words, kind="stable")


class DifficultyStream:
    """Prompts drawn by their running accuracy, as GPG does (arXiv 2504.02546; open-r1/src/open_r1/gpg_trainer.py).

    The first epoch is a permutation. Each later one is drawn with weights that are fixed when it begins: with a the
    share of right completions in the epoch that the prompt was last drawn in, ``hard`` weighs 1 - a, ``medium`` 1 if
    0 < a < 1 and else 0; a prompt that wasn't drawn yet weighs 1. GPG draws an epoch's prompts with replacement; here
    a step holds no prompt twice. Where fewer prompts than a step takes weigh anything, others fill it up.
    """

    def __init__(self, sampling: Literal["hard", "medium"], first: PermutedStream, seed: int) -> None:
        """Begin with the first epoch.

        Args:
            first: the source's permutations, of which the first epoch is used.
            seed: 0 <= seed < 2**63; with a step's first position it names the random numbers of the step.
        """
        self._sampling, self._first, self._seed = sampling, first, seed
        self._epoch = 0  # the one that the weights are of
        self._weights = np.ones(first.size)
        self._right, self._all, self._seen = np.zeros((3, first.size), np.int64)  # _seen: in which epoch, from 1

    def take(self, start: int, stop: int) -> list[int]:
        epoch = start // self._first.size
        if epoch == 0:
            return self._first.take(start, stop)
        if epoch != self._epoch:
            raise ValueError(f"the prompts of epoch {epoch} are not known in epoch {self._epoch}")
        words = np.random.Philox(key=[self._seed, start]).random_raw(self._first.size)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        weighed = self._weights > 0
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted draw without replacement. Prompts without a
        # weight come behind all others.
        keys = np.where(weighed, np.log(uniform) / np.where(weighed, self._weights, 1.0), -np.inf)
        order = np.lexsort((uniform, keys))[::-1]
        return order[: stop - start].tolist()

    def knows(self, start: int) -> bool:
        return start // self._first.size in (0, self._epoch)

    def observe(self, start: int, stop: int, results: Sequence[tuple[int, int, int]]) -> None:
        epoch = start // self._first.size
        for index, right, total in results:
            if self._seen[index] != epoch + 1:
                self._seen[index], self._right[index], self._all[index] = epoch + 1, 0, 0
            self._right[index] += right
            self._all[index] += total
        if stop // self._first.size > epoch:
            self._epoch, self._weights = stop // self._first.size, self._weigh()

    def _weigh(self) -> np.ndarray:
        seen = self._all > 0
        accuracy = self._right / np.where(seen, self._all, 1)
        known = 1.0 - accuracy if self._sampling == "hard" else ((accuracy > 0) & (accuracy < 1)).astype(float)
        return np.where(seen, known, 1.0)

    def state(self) -> dict[str, Any]:
        counts = {"right": self._right, "all": self._all, "seen": self._seen}
        return {
            "epoch": self._epoch,
            "weights": _pack(self._weights.astype("<f8")),
            **{name: _pack(values.astype("<i4")) for name, values in counts.items()},
        }

    def load(self, state: dict[str, Any] | None) -> None:
        assert state is not None, "the sampler refuses the state of another kind of stream"
        self._epoch = int(state["epoch"])
        self._weights = _unpack(state["weights"], "<f8")
        self._right, self._all, self._seen = (
            _unpack(state[name], "<i4").astype(np.int64) for name in ("right", "all", "seen")
        )


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).copy()
