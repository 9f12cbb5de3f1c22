"""What an algorithm is: a class with two hooks. Whatever keeps to it trains; no other part knows one by its name.

    advantages(groups)   scored groups -> one number for each completion
    token_loss(tokens)   tokens of a micro-batch with their log-probs -> their part of the loss, and sums for metrics

Denominators are not the algorithm's business: a token comes with its weight, which holds 1 / (denominator of the whole
optimizer batch), and the loss is a sum of weights times values. So it does not depend on how the batch was cut into
micro-batches and over ranks. ``nemo-aapo check-algorithm`` shows whether that is so.

This module imports no torch, so that settings can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nemo_aapo.types import Group

if TYPE_CHECKING:
    import torch

Loss = tuple["torch.Tensor", dict[str, "torch.Tensor"]]
"""These tokens' part of the loss, a scalar sum; and detached sums over tokens by the names of metrics, which become
means per token over the whole batch (keys that start with ``min/``: minima)."""


class Algorithm(ABC):
    """Base of all algorithms. Subclasses are frozen dataclasses: their fields are their settings.

    Example::

        @dataclass(frozen=True)
        class Shifted(Algorithm):
            shift: float = 0.1

            def advantages(self, groups):
                return groups.rewards - self.shift

            def token_loss(self, tokens):
                return -(tokens.weights * tokens.advantages * tokens.logprobs).sum(), {}
    """

    paper: ClassVar[str] = ""
    """Name and source in Markdown, for the card of a model that was trained by it."""
    whole_batch: ClassVar[bool] = False
    """True: ``advantages`` takes the groups of all ranks at once, which then gather their rewards."""

    @property
    def needs_reference_rewards(self) -> bool:
        """True if ``advantages`` takes rewards of the frozen reference's completions (``algorithm.reference``)."""
        return False

    @property
    def needs_reference_logprobs(self) -> bool:
        """True if ``token_loss`` takes the frozen reference's log-probs, which cost a forward pass."""
        return False

    @property
    def needs_old_logprobs(self) -> bool:
        """True if ``token_loss`` takes the learner's log-probs before the first of several updates on a batch."""
        return False

    @property
    def needs_entropy_gradient(self) -> bool:
        """True if the loss's gradient goes through ``tokens.entropy``."""
        return False

    @property
    def learns_without_advantage(self) -> bool:
        """True if a completion whose advantage is zero can have a gradient; others are left out of the passes."""
        return self.needs_reference_logprobs or self.needs_entropy_gradient

    @abstractmethod
    def advantages(self, groups: ScoredGroups) -> np.ndarray:
        """float64 [N, G], the advantage of each completion; what stands where a reward is NaN is not looked at."""

    @abstractmethod
    def token_loss(self, tokens: Tokens) -> Loss:
        """The loss of these tokens as a sum of ``tokens.weights`` times something, and sums for metrics."""

    def metrics(self, groups: ScoredGroups, advantages: np.ndarray) -> dict[str, float]:
        """Numbers of a step that are logged as they are, from all ranks' groups and their advantages [N, G]."""
        return {}


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroups:
    """N groups of G completions, all that advantages can be made from."""

    rewards: np.ndarray
    """float64 [N, G], NaN where scoring failed."""
    reference_rewards: np.ndarray | None = None
    """float64 [N, K], NaN where scoring failed; None where the run has none."""
    seeds: Sequence[int] | None = None
    """One for each group, of a random stream that no other use has; the same however groups lie on ranks."""
    reward_parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name of a reward -> its unweighted values, float64 [N, G]; NaN where it gave none."""
    lengths: np.ndarray | None = None
    """int64 [N, G], completion tokens."""
    truncated: np.ndarray | None = None
    """bool [N, G], completions that were cut at the length limit."""
    step: int = 0
    """Training steps done before this one."""
    max_steps: int = 1
    """``trainer.max_steps``"""

    def __post_init__(self) -> None:
        """Nobody writes into the arrays: what others go on with would change."""
        for name in ("rewards", "reference_rewards", "lengths", "truncated"):
            if (values := getattr(self, name)) is not None:
                view = np.asarray(values).view()
                view.setflags(write=False)
                object.__setattr__(self, name, view)

    @classmethod
    def of(cls, groups: Sequence[Group], **more: Any) -> ScoredGroups:
        """Of at least one group.

        Args:
            more: ``seeds``, ``step``, ``max_steps``.
        """
        known = [group.reference_rewards for group in groups if group.reference_rewards is not None]
        return cls(
            rewards=np.stack([group.rewards for group in groups]),
            reference_rewards=np.stack(known) if known else None,
            reward_parts={name: np.stack([g.reward_parts[name] for g in groups]) for name in groups[0].reward_parts},
            lengths=np.array([[len(c.token_ids) for c in group.completions] for group in groups]),
            truncated=np.array([[c.finish_reason == "length" for c in group.completions] for group in groups]),
            **more,
        )

    @classmethod
    def joined(cls, parts: Sequence[ScoredGroups]) -> ScoredGroups:
        """The groups of several ranks as one, in the order of the parts."""

        def stack(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else np.concatenate(values)

        first = parts[0]
        return dataclasses.replace(
            first,
            **{name: stack(name) for name in ("rewards", "reference_rewards", "lengths", "truncated")},
            seeds=None if first.seeds is None else [seed for part in parts for seed in part.seeds or ()],
            reward_parts={n: np.concatenate([p.reward_parts[n] for p in parts]) for n in first.reward_parts},
        )

    def random(self, group: int) -> np.random.Generator:
        """The random stream of a group, from its start.

        Raises:
            ValueError: there are no seeds.
        """
        if self.seeds is None:
            raise ValueError("random numbers of a group need seeds")
        return np.random.default_rng(self.seeds[group])


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The completion tokens of a micro-batch, sequence by sequence: n in all. Padding has weight 0 and holds zeros."""

    logprobs: torch.Tensor
    """float [n], log pi(token) under the current weights at the sampling temperature; carries the gradient."""
    advantages: torch.Tensor
    """float [n], the advantage of the token's completion."""
    weights: torch.Tensor
    """float [n], what the token's value counts in the loss: 1 / denominator, times the importance weight or mask that
    the run's settings put on it."""
    rollout_logprobs: torch.Tensor
    """float [n], the engine's."""
    old_logprobs: torch.Tensor | None = None
    """float [n], the learner's before the first of several updates, there where the algorithm needs them; in the first
    update the current ones without a gradient."""
    reference_logprobs: torch.Tensor | None = None
    """float [n], the frozen reference's, there where the algorithm needs them."""
    entropy: torch.Tensor | None = None
    """float [n], of the policy at each token, in nats; carries a gradient where the algorithm needs it, or the run has
    an ``algorithm.entropy_coefficient``."""
    shares: torch.Tensor | None = None
    """float [n], 1 / denominator alone: for terms that do not depend on what sampled the token, as a KL term."""
    valid: torch.Tensor | None = None
    """bool [n], False at padding; there when an algorithm sees the tokens, as ``shares`` is."""
    lengths: Sequence[int] | None = None
    """Tokens at hand of each of the S sequences; they sum to n. Context parallelism cuts a sequence over ranks."""
    versions: torch.Tensor | None = None
    """int64 [n], optimizer steps that the policy had taken which sampled the token."""
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Adds up over the ranks that a sequence is cut over, with its gradient; None: it is whole."""

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of the values [n] over each token's whole sequence, at each of its tokens: [n], with a gradient.

        It depends on the sequence alone, not on the micro-batch: the way to work with sequences in a loss.

        Raises:
            ValueError: the lengths are not known.
        """
        import torch

        if self.lengths is None:
            raise ValueError("means over sequences need the sequences' lengths")
        if not self.lengths:
            return values
        sums = torch.stack([part.sum() for part in values.split(list(self.lengths))])
        counts = torch.tensor(self.lengths, dtype=values.dtype, device=values.device)
        if self.reduce is not None:
            sums, counts = self.reduce(torch.stack([sums, counts])).unbind()
        lengths = torch.tensor(self.lengths, device=values.device)
        return torch.repeat_interleave(sums / counts.clamp(min=1), lengths)

    def replace(self, **changes: Any) -> Tokens:
        """A copy with some fields set."""
        return dataclasses.replace(self, **changes)
