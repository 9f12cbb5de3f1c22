"""New weights between two decoding steps, in the midst of sequences: which version sampled which of their tokens."""

from __future__ import annotations

import numpy as np

from nemo_aapo.engines.megatron.scheduler import Scheduler


class TokenVersions:
    """The versions of running sequences' tokens. All rows change at the same step, so a few numbers a row suffice."""

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


def contents(scheduler: Scheduler, prompts: list[np.ndarray], row: int) -> np.ndarray:
    """The tokens of a row whose keys and values are in the cache: all but the last one sampled."""
    sampled = scheduler.tokens[row, : scheduler.sampled[row] - 1]
    return np.concatenate([prompts[scheduler.prompt[row]], sampled])
