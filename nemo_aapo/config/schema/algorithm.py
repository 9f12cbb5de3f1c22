"""Settings of the algorithm: which estimator and which loss."""

from __future__ import annotations

from typing import Any, Literal

from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import STEPS


@section
class Margin:
    """Bounds and estimator of AAPO's margin."""

    low: float = setting("the most that one completion loses against the reference, at most 0", decides=True, sane=1e6)
    high: float = setting(
        "the most that one completion gains against the reference, at least 0", decides=True, sane=1e6
    )
    estimator: Literal["sampled", "expected"] = setting(
        "sampled: one reference reward per completion | expected: the mean over all K", decides=True
    )


@section
class MarginSchedule:
    """How the margin's bounds shrink in the course of a run."""

    shape: Literal["linear", "cosine"] = setting("the way from 1 to end", decides=True)
    steps: int = setting("training steps until the end is reached", decides=True, minimum=1, sane=STEPS)
    end: float = setting("share of the bounds that is left from then on", decides=True, minimum=0, maximum=1)


@section
class Clip:
    """How far the importance ratio may go from 1."""

    low: float = setting("the importance ratio is cut at 1 - low; 1: no lower bound", decides=True, above=0, maximum=1)
    high: float = setting("the importance ratio is cut at 1 + high", decides=True, above=0, sane=1e6)


@section
class Band:
    """Ratios of learner to engine that are let through."""

    low: float = setting("a ratio below it is masked", decides=True, minimum=0, maximum=1)
    high: float = setting("a ratio above it is masked", decides=True, minimum=1, sane=1e6)


@section
class AlgorithmConfig:
    """Which algorithm, and its switches."""

    name: str = setting("the algorithm; algorithm=NAME chooses it with its paper's settings", decides=True)
    custom: str | None = setting(
        "an algorithm of your own in its place: path/to/file.py:MyClass or package.module:MyClass",
        decides=False,
        path=True,
    )
    settings: dict[str, Any] | None = setting("values of the fields of MyClass: {field: value}", decides="set")
    scale_rewards: bool = setting("divide the centred reward by the group's standard deviation", decides=True)
    reference: Literal["cached", "online"] | None = setting(
        "rewards of the frozen base model: cached (stored once) | online (sampled every step) | null", decides=True
    )
    reference_samples: int | None = setting(
        "K: stored reference completions per prompt (cached: K >= G, online: K = G)",
        decides=True,
        minimum=1,
        sane=1_000_000,
    )
    reference_store: str | None = setting(
        "where cached reference rewards are kept; any number of runs may share a file", decides=False, path=True
    )
    reference_fill_steps: int | None = setting(
        "null: before the first step all that the run needs | N: for large data, N steps' prompts at a time",
        decides=False,
        minimum=1,
        sane=STEPS,
    )
    margin: Margin | None = setting("delta = clip(r - r_reference, low, high); null: no margin", decides=True)
    rescale_dead_groups: bool = setting(
        "GPG's alpha = B / (B - M): divide by groups with a signal, not by all", decides=True
    )
    loss: Literal["cross_entropy", "ratio_clip", "sequence_ratio_clip", "clipped_weight"] = setting(
        "cross_entropy (AAPO, GPG) | ratio_clip (GRPO, DAPO) | sequence_ratio_clip (GSPO) | clipped_weight (CISPO)",
        decides=True,
    )
    clip: Clip | None = setting("{low, high} of the importance ratio; not for cross_entropy", decides=True)
    kl_coefficient: float = setting(
        "weight of KL(policy, reference), k3 estimator; not for cross_entropy", decides=True, minimum=0, sane=1e6
    )
    loss_aggregation: Literal["token", "sequence", "fixed_length"] = setting(
        "token: one mean over all tokens | sequence: mean of means | fixed_length: sum / (sequences x max_new_tokens)",
        decides=True,
    )
    updates_per_rollout: int = setting(
        "optimizer steps on each rollout batch; more than 1 makes the later ones off-policy",
        decides=True,
        minimum=1,
        sane=10_000,
    )
    importance_weight_cap: float | None = setting(
        "truncated importance weight min(pi_train / pi_rollout, cap); null: none", decides=True, minimum=1, sane=1e6
    )
    token_mask: Band | None = setting(
        "{low, high}: drop tokens whose pi_train / pi_rollout is outside (IcePop: 0.5, 5); null: none", decides="set"
    )
    sequence_mask: Band | None = setting(
        "{low, high}: drop completions whose geometric mean of pi_train / pi_rollout is outside; null: none",
        decides="set",
    )
    sequence_kl_limit: float | None = setting(
        "drop completions whose mean KL(pi_rollout, pi_train) per token is above; null: none",
        decides="set",
        above=0,
        sane=1e6,
    )
    probability_change_limit: float | None = setting(
        "drop tokens whose probability has moved by more than this as the advantage pushes (DPPO: 0.2); null: none",
        decides="set",
        above=0,
        maximum=1,
    )
    max_masked_fraction: float | None = setting(
        "stop the run where more of a step's tokens are masked: engine and learner disagree; null: never",
        decides=False,
        above=0,
        maximum=1,
    )
    margin_schedule: MarginSchedule | None = setting(
        "{shape, steps, end}: the margin's bounds shrink to a share of them; null: they stay", decides="set"
    )
    scale_margin: bool = setting(
        "divide r - r_reference by the reference rewards' standard deviation before it is clipped: for graded rewards",
        decides="set",
    )
    dual_clip: float | None = setting(
        "with a negative advantage no token counts more than so many times it (3, say); for ratio_clip; null: no bound",
        decides="set",
        above=1,
        sane=1e6,
    )
    min_group_size: int | None = setting(
        "a group of which fewer completions could be scored leaves the step; null: none does",
        decides="set",
        minimum=2,
        sane=1_000_000,
    )
    mask_truncated: bool | None = setting(
        "true: a completion cut at the length limit counts in its group's mean and has no part in the loss",
        decides="set",
    )
    entropy_coefficient: float = setting(
        "weight of the policy's entropy in the loss, which keeps it from falling; 0: none",
        decides="set",
        minimum=0,
        sane=1e6,
    )
    needs: tuple[Literal["reference_logprobs", "old_logprobs", "entropy_gradient"], ...] | None = setting(
        "what the hooks of MyClass take besides: reference_logprobs, old_logprobs, entropy_gradient; null: as it says",
        decides="set",
    )

    @property
    def needs_reference_logprobs(self) -> bool:
        """Whether the loss takes the frozen reference's log-probs, which cost a forward pass."""
        return self.kl_coefficient > 0 or "reference_logprobs" in (self.needs or ())

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the loss has a ratio to the log-probs before the first of several updates on a batch."""
        return self.clip is not None or "old_logprobs" in (self.needs or ())

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss's gradient goes through the policy's entropy."""
        return self.entropy_coefficient > 0 or "entropy_gradient" in (self.needs or ())

    @property
    def compares_with_reference(self) -> bool:
        """Whether the base model is needed besides the policy, for its rewards or its log-probs."""
        return self.reference is not None or self.needs_reference_logprobs
