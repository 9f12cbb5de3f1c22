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
    """One question, tokenised once when the data is loaded.

    Example:
        ``Prompt(id="9f2c...", token_ids=[5, 18, 7], text="What is 2 + 2?", answer="4", source="train.jsonl:1")``
    """

    id: str
    """Digest of the token ids and the gold answer: the same question has the same id in every run."""
    token_ids: np.ndarray
    """int32 [P], the input of the engine."""
    text: str
    """The rendered prompt, for people and for rewards that read it."""
    answer: str
    """The gold answer in the form that the verifier takes."""
    source: str
    """The place in the data that it came from: ``file:line``."""


NO_ROUTE = 255
"""Stands in ``Routes`` where no choice of experts was recorded: the model's own choice holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """The experts that a mixture of experts sent each token of a sequence to: L layers, k experts each.

    A token has no route in a layer (``NO_ROUTE``) where nothing read what the layer made of it.
    """

    prompt: np.ndarray
    """uint8 [P, L, k]; completions of one prompt have one and the same array."""
    completion: np.ndarray
    """uint8 [T - 1, L, k], without the last token, which was never fed; [0, L, k] for a completion without tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled answer, token for token as the engine generated it.

    Example:
        With 2 as the stop token: ``Completion(token_ids=[9, 4, 2], logprobs=[-0.1, -1.2, -0.3], finish_reason="stop",
        policy_version=17)``
    """

    token_ids: np.ndarray
    """int32 [T]. If ``finish_reason`` is ``"stop"``, it ends with the stop token or the last token of the stop string.
    T may be 0."""
    logprobs: np.ndarray
    """float32 [T], log pi(token) at the sampling temperature, as the engine computed it."""
    finish_reason: FinishReason
    """``"stop"``: a stop token was sampled, or a stop string completed. ``"length"``: cut at the length limit."""
    policy_version: int
    """Number of optimizer steps that the policy had taken which the engine served; if that changed, for the
    first token."""
    routes: Routes | None = None
    """The engine's choices of experts, for the learner to replay; None where it recorded none."""
    versions: np.ndarray | None = None
    """int32 [T], the same for each token, ascending, where the engine took new weights meanwhile (``rollout.max_lag``);
    None: one policy sampled them all."""

    @property
    def token_versions(self) -> np.ndarray:
        """int32 [T], for each token the optimizer steps of the policy that sampled it."""
        if self.versions is not None:
            return self.versions
        return np.full(len(self.token_ids), self.policy_version, np.int32)


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How completions are sampled. Policy and reference use one spec, or their rewards could not be compared.

    Example:
        ``SamplingSpec(temperature=1.0, max_new_tokens=512, stop_token_ids=(2,))``
    """

    temperature: float
    """Logits are divided by it before the softmax; 0 means greedy."""
    max_new_tokens: int
    """Completions are cut here (finish reason ``"length"``)."""
    stop_token_ids: tuple[int, ...]
    """Sampling one of these tokens ends the completion, which keeps it."""
    min_new_tokens: int = 0
    """Stop tokens have probability zero while a completion has fewer tokens than this."""
    top_p: float = 1.0
    """Nucleus truncation; evaluation only, as training needs the full softmax."""
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these strings in its text, which it keeps; with fewer than
    ``min_new_tokens`` tokens it goes on, up to the next such token. Padding is no text."""

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken each time."""
        return self.temperature == 0.0


RIGHT = 1.0
"""The least value of a right completion, for rewards that tell right from wrong; ``validation.reward`` names one."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The G completions of one prompt, scored; the advantages are added when they are computed.

    Example:
        Two completions, one right, with four reference rewards: ``rewards=[1, 0]``, ``reward_parts={"math": [1, 0]}``,
        ``failed=[False, False]``, ``reference_rewards=[0, 1, 0, 0]``. With the expected margin in [-1, 1] and no
        division by the standard deviation: ``advantages=[0.5 + 0.75, -0.5 - 0.25]``.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    """The G completions, in the order of their seeds."""
    texts: tuple[str, ...]
    """The completions decoded, for rewards and for people: never tokenised again."""
    rewards: np.ndarray
    """float64 [G], the weighted sum of all rewards; NaN where scoring failed."""
    reward_parts: dict[str, np.ndarray]
    """Name of a reward -> its unweighted values, float64 [G]; NaN where it gave none."""
    failed: np.ndarray
    """bool [G], True where scoring failed or timed out: the completion has no reward, and leaves the step."""
    reference_rewards: np.ndarray | None = None
    """float64 [K], rewards of K completions of the frozen reference, NaN where scoring failed; None where the algorithm
    needs none."""
    advantages: np.ndarray | None = None
    """float64 [G], the final (augmented) advantages A*, NaN where scoring failed; None until they are computed."""

    @property
    def final_advantages(self) -> np.ndarray:
        """``advantages`` of a group that has them.

        Raises:
            RuntimeError: they were not computed yet.
        """
        if self.advantages is None:
            raise RuntimeError(f"the group of prompt {self.prompt.id} has no advantages yet: compute them first")
        return self.advantages

    def right(self, reward: str) -> np.ndarray:
        """float64 [G]: 1 for a completion that this reward calls right, to which it gives at least ``RIGHT``; 0 for a
        wrong one; NaN for one that it could not judge."""
        values = self.reward_parts[reward]
        return np.where(np.isnan(values), np.nan, values >= RIGHT)

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
    versions: np.ndarray | None = None
    """int32 [T], optimizer steps that the policy had taken which sampled each token; None: 0, for whoever asks not."""
    routes: Routes | None = None
    """The engine's choices of experts, to be replayed; None: the model's own hold."""

    @property
    def length(self) -> int:
        """P + T, tokens that the forward pass sees."""
        return len(self.prompt_ids) + len(self.completion_ids)
