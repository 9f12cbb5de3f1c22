"""Which curves the page draws: data, in the order in which they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot.

    Example: ``Chart("reward", "Reward", ("reward/mean", "reference_reward/mean"), "of the completions of a step")``
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    """Lines; where several runs are compared, the first is drawn of each run."""
    about: str
    """One line for people."""
    kind: Literal["line", "stack"] = "line"
    unit: str = ""
    validation: bool = False
    """The metrics are those of validations."""
    tints: tuple[int, ...] = ()
    """Number of each line's colour; counted up where nothing is said."""
    error: str = ""
    """The metric that is the standard error of the first."""


CURVES = (
    Chart("reward", "Reward", ("reward/mean", "reference_reward/mean"), "mean of a step, and of the frozen reference"),
    Chart(
        "accuracy",
        "Accuracy on held-out prompts",
        ("validation/accuracy_sampled", "validation/accuracy_greedy"),
        "with one standard error of the sampled one",
        validation=True,
        error="validation/accuracy_sampled_stderr",
    ),
    Chart(
        "advantage",
        "Group advantage and margin",
        ("margin/abs_mean", "advantage/group_abs_mean", "advantage/abs_mean"),
        "mean size of δ, of A, and of A* = A + δ, which is trained on",
    ),
    Chart("entropy", "Entropy", ("entropy",), "nats a token: how much is still open", unit="nats"),
    Chart(
        "lowest",
        "Lowest log-prob under negative advantage",
        ("negative_advantage_logprob",),
        "tokens that are pushed down although they are hardly sampled any more",
    ),
    Chart(
        "length",
        "Completion length",
        ("completion_length/mean", "completion_length/max"),
        "tokens; mean and longest of a step",
        unit="tokens",
    ),
    Chart("truncated", "Cut at the length limit", ("truncated_fraction",), "share of completions"),
    Chart("grad", "Gradient norm", ("grad_norm",), "before clipping"),
    Chart("loss", "Loss", ("loss",), "of the optimizer step"),
    Chart(
        "parity",
        "Parity of engine and learner",
        ("parity/mult_prob_error",),
        "exp of the mean |difference|; 1 is perfect",
    ),
    Chart("kl", "KL of engine and learner", ("parity/gen_kl",), "estimate, on the sampled tokens"),
    Chart(
        "lag",
        "Staleness",
        ("rollout/lag", "rollout/lag_max"),
        "updates between the policy that sampled and the one that learns",
    ),
    Chart("lr", "Learning rate", ("lr",), "of the optimizer step"),
    Chart("failed", "Scoring failed", ("reward/failed_fraction",), "share of completions without a reward"),
)
"""The section of curves."""
TIMES = (
    Chart(
        "phases",
        "Seconds of a step",
        ("time/rollout", "time/reward", "time/reference", "time/train", "time/refit", "time/other"),
        "rank 0's; a rollout's rewards are scored meanwhile, what is waited for after it counts as reward",
        kind="stack",
        unit="s",
    ),
    Chart(
        "speed",
        "Completion tokens per second",
        ("tokens_per_second", "rollout/tokens_per_second"),
        "of the step, of its rollout",
    ),
    Chart(
        "servers",
        "Rollout servers at work",
        ("servers/busy_fraction", "servers/kv_cache_use"),
        "share of the time in which they generate; the fullest KV cache",
    ),
    Chart("fleet", "Rollout servers that answer", ("servers/answering", "servers/failures"), "and failures so far"),
    Chart("server_speed", "Tokens per second of the servers", ("servers/tokens_per_second",), "of all together"),
    Chart("server_queue", "Completions that servers have to draw", ("servers/outstanding",), "asked for and not ended"),
    Chart("server_refit", "Last refit of the slowest server", ("servers/refit_seconds",), "from its turn on", unit="s"),
    Chart(
        "server_version",
        "Policy version of the servers",
        ("servers/policy_version",),
        "the oldest that one serves, asked about once a step",
    ),
    Chart("idle", "Idle rows of the engine", ("rollout/idle_fraction",), "share, averaged over its steps"),
    Chart("mfu", "Model FLOP/s utilisation", ("mfu",), "of the whole step, over the GPU's peak"),
    Chart("tflops", "TFLOP/s of a rank", ("tflops/train", "tflops/step"), "in training, and over the whole step"),
    Chart("memory", "Peak memory", ("memory/peak_gib",), "of rank 0 so far, GiB"),
    Chart(
        "padding",
        "Padding and shared prompts",
        ("padding_fraction", "shared_prompt_fraction"),
        "share of the training passes' tokens",
    ),
)
"""The section on where the time went."""
GROUPS = (
    Chart(
        "groups",
        "Groups of a step",
        ("groups/mixed", "groups/all_right", "groups/all_wrong", "groups/failed"),
        "only mixed groups have a group advantage",
        kind="stack",
        tints=(0, 2, 4, 5),
    ),
    Chart(
        "signal",
        "What the margin adds",
        ("groups/by_margin", "groups/zero_advantage"),
        "share of groups that learn by the margin alone, and of groups that nothing is learned from",
    ),
    Chart(
        "bound", "Margin at its bound", ("margin/at_bound",), "share of completions whose margin is clipped throughout"
    ),
)
"""The section of groups."""
