"""Longest expected first: the order in which prompts enter an engine that can't take all at once.

A long completion that enters last runs alone at the end, with the other rows empty. How long the completions of a
prompt will be is known roughly from those it had before. The order decides what runs beside what, never which tokens
come out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from nemo_aapo.types import Prompt

PROMPTS_KEPT = 8192
"""Lengths are kept of so many prompts, those seen last: they are part of each checkpoint (about 0.4 MB)."""
_WEIGHT_OF_NEW = 0.5
"""The newest length's weight in a running mean: the policy changes, and its lengths with it."""


class LengthPredictor:
    """Predicts completion lengths in tokens by prompt: running means of the lengths that were seen.

    Example:
        >>> predictor = LengthPredictor()
        >>> predictor.observe([("short", 3.0), ("long", 40.0)])
        >>> predictor.state_dict()
        {'short': 3.0, 'long': 40.0}
    """

    def __init__(self) -> None:
        self._means: OrderedDict[str, float] = OrderedDict()  # prompt id -> tokens, the prompt seen last at the end

    def longest_first(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices of the prompts, longest expected completions first.

        A prompt that wasn't seen counts as average. Among equals the longest prompt comes first: it leaves the engine
        the rows that are filled most.
        """
        expected = self.expected(prompts)
        return sorted(range(len(prompts)), key=lambda i: (-expected[i], -len(prompts[i].token_ids)))

    def expected(self, prompts: Sequence[Prompt]) -> list[float]:
        """Tokens that a completion of each prompt is expected to have; 0 where no length was ever seen."""
        average = sum(self._means.values()) / len(self._means) if self._means else 0.0
        return [self._means.get(prompt.id, average) for prompt in prompts]

    def observe(self, lengths: Iterable[tuple[str, float]]) -> None:
        """Take in (prompt id, mean length of its completions), and forget the prompts that were seen longest ago."""
        for prompt, length in lengths:
            old = self._means.pop(prompt, length)
            self._means[prompt] = old + _WEIGHT_OF_NEW * (length - old)
        while len(self._means) > PROMPTS_KEPT:
            self._means.popitem(last=False)

    def state_dict(self) -> dict[str, float]:
        """The means, by prompt id. Without them a resumed run would generate the same tokens in other batches, and the
        last bits of the engine's log-probs depend on the batch."""
        return dict(self._means)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what ``state_dict`` gave."""
        self._means = OrderedDict(state)
