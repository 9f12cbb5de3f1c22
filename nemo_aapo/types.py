"""The data that flows through one training step, as frozen records.

    Prompt -> Completion (G per prompt) -> Group (rewards, advantages) -> Sample (what the learner trains on)

Token ids travel from the engine to the loss untouched; text exists only for verifiers and for people.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One question, tokenised once when the data is loaded."""

    id: str
    """Digest of the token ids and the gold answer: the same question has the same id in every run."""
    token_ids: np.ndarray
    """int32 [P], what the engine is fed."""
    text: str
    """The rendered prompt, for people and for rewards that read it."""
    answer: str
    """The gold answer in the form that the verifier takes."""
    source: str
    """Where it came from: ``file:line``."""


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled answer, exactly as the engine drew it."""

    token_ids: np.ndarray
    """int32 [T]; ends with what stopped it, a stop token or the last token of a stop string, if ``finish_reason`` is
    ``"stop"``. T may be 0."""
    logprobs: np.ndarray
    """float32 [T], log pi(token) at the sampling temperature, as the engine computed it."""
    finish_reason: FinishReason
    """``"stop"``: a stop token was drawn, or a stop string completed. ``"length"``: cut at the length limit."""
    policy_version: int
    """Number of optimizer steps behind the policy that the engine served."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How completions are drawn. One spec serves policy and reference, or their rewards can't be compared."""

    temperature: float
    """Logits are divided by it before the softmax; 0 means greedy."""
    max_new_tokens: int
    """Completions are cut here (finish reason ``"length"``)."""
    stop_token_ids: tuple[int, ...]
    """Drawing one ends the completion, which keeps it."""
    min_new_tokens: int = 0
    """Stop tokens get probability zero before this many tokens."""
    top_p: float = 1.0
    """Nucleus truncation; evaluation only, as training needs the full softmax."""
    stop_strings: tuple[str, ...] = ()
    """A completion whose text contains one, ``min_new_tokens`` or more tokens long, ends with the token that completed
    it, which it keeps. Special tokens are no text."""

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken each time."""
        return self.temperature == 0.0


RIGHT = 1.0
"""Of a reward that tells right from wrong, the value of a right completion; ``validation.reward`` names one."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The G completions of one prompt, with what is known of them so far."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    """G of them."""
    texts: tuple[str, ...]
    """The completions decoded, for rewards and for people: never tokenised again."""
    rewards: np.ndarray
    """float64 [G], the weighted sum of all rewards."""
    reward_parts: dict[str, np.ndarray]
    """Each reward's unweighted values, float64 [G], by name."""
    failed: np.ndarray
    """bool [G], scoring failed or timed out, and ``reward_runner.score_on_failure`` stands for the reward."""
    reference_rewards: np.ndarray | None = None
    """float64 [K], rewards of K completions of the frozen reference; None where the algorithm needs none."""
    advantages: np.ndarray | None = None
    """float64 [G], the final (augmented) advantages A*."""

    def right(self, reward: str) -> np.ndarray:
        """bool [G], which completions this reward calls right: those it gives at least ``RIGHT``."""
        return self.reward_parts[reward] >= RIGHT

    def replace(self, **changes) -> Group:
        """A copy with some fields set."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence as the learner sees it."""

    prompt_ids: np.ndarray
    """int32 [P]"""
    completion_ids: np.ndarray
    """int32 [T], T >= 1: every one of them is trained on."""
    rollout_logprobs: np.ndarray
    """float32 [T], the engine's."""
    advantage: float
    """A*, the same for all T tokens."""

    @property
    def length(self) -> int:
        """P + T, tokens that the forward pass sees."""
        return len(self.prompt_ids) + len(self.completion_ids)
