"""Which prompts a step takes: a pure function of the step, so that a resume needs nothing but its number."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nemo_aapo.data import DataError


class PromptSampler:
    """Goes through all prompts epoch by epoch, ``prompts_per_step`` at a time.

    Each epoch is a permutation of all prompts. A step that runs over an epoch's end takes the rest from the next one,
    whose order is changed just enough that no step holds a prompt twice. What the steps ahead will take can be asked
    for at any time, which is how reference rewards are filled for exactly the prompts that a run uses.
    """

    def __init__(
        self, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool = True, data_digest: str = ""
    ) -> None:
        """Args:
            num_prompts: prompts in the data set.
            prompts_per_step: prompts that one step takes.
            seed: 0 <= seed < 2**63; with the epoch's number it names the permutation.
            shuffle: False takes the prompts in the file's order.
            data_digest: ``PromptSet.digest``, so that a checkpoint is not resumed on other data.

        Raises:
            ValueError: a size below 1, fewer prompts than a step takes, or a seed out of range.
        """
        if num_prompts < 1 or prompts_per_step < 1:
            raise ValueError(
                f"num_prompts ({num_prompts}) and prompts_per_step ({prompts_per_step}) must be at least 1"
            )
        if num_prompts < prompts_per_step:
            raise DataError(
                f"prompts_per_step is {prompts_per_step}, but the data set holds only {num_prompts} prompts: a step "
                "would take one twice; lower prompts_per_step or add prompts"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.data_digest = data_digest
        self.step = 0
        """The next step to take: the trainer moves it on, ``state_dict`` keeps it."""
        self._tails: list[np.ndarray] = []
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def indices(self, step: int) -> list[int]:
        """The indices of the prompts of a step (from 0), all different, in ``range(num_prompts)``."""
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        taken: list[int] = []
        while len(taken) < self.prompts_per_step:
            epoch, offset = divmod(step * self.prompts_per_step + len(taken), self.num_prompts)
            wanted = self.prompts_per_step - len(taken)
            taken += self._order(epoch)[offset : offset + wanted].tolist()
        return taken

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of the first prompt of a step."""
        return step * self.prompts_per_step // self.num_prompts

    def _compute_order(self, epoch: int) -> np.ndarray:
        """int64 [num_prompts], the order of an epoch."""
        # An epoch's order depends on the tail of the one before, so tails are kept from the first epoch on.
        while len(self._tails) < epoch:
            past = len(self._tails)
            order = self._arrange(past)
            used = (past + 1) * self.num_prompts % self.prompts_per_step
            self._tails.append(order[self.num_prompts - used :])
        return self._arrange(epoch)

    def _arrange(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, with what the shared step already took kept out of that step's other half."""
        order = self._permutation(epoch)
        tail = self._tails[epoch - 1] if epoch else order[:0]
        if not len(tail):
            return order
        free = np.flatnonzero(~np.isin(order, tail))[: self.prompts_per_step - len(tail)]
        return np.concatenate([order[free], np.delete(order, free)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        # Sorting raw words: NumPy promises the bit generator's stream for ever, but not Generator.permutation's.
        words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_prompts)
        return np.argsort(words, kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and all that it depends on."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the cursor.

        Raises:
            ValueError: the state belongs to another order of prompts; every difference is named.
        """
        wanted = self._identity()
        differences = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in wanted.items() if state.get(k) != v]
        if differences:
            raise ValueError(
                f"can't resume the order of prompts: {'; '.join(differences)}; "
                "restore these settings and the data, or start a new run"
            )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        names = ("num_prompts", "prompts_per_step", "seed", "shuffle", "data_digest")
        return {name: getattr(self, name) for name in names}
