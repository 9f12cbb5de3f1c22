"""One rollout batch -> optimizer steps.

groups with advantages -> drop what has no gradient, or no score -> micro-batches over the ranks -> score -> update
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.algorithms.advantage import zero_advantage
from nemo_aapo.algorithms.base import Tokens
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.errors import ParityError
from nemo_aapo.learner.batch_plan import padding_fraction, plan
from nemo_aapo.learner.microbatch import PrefixGroup, chunks, collate, pad_to
from nemo_aapo.learner.policy import MegatronPolicy
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.types import Group, Sample


@dataclass(frozen=True, slots=True)
class Learner:
    """Trains a policy on scored groups by an algorithm; all methods are collective over all ranks."""

    policy: MegatronPolicy
    objective: Objective
    max_tokens_per_microbatch: int
    """Upper bound of a micro-batch's tokens, padding included."""
    updates_per_rollout: int
    """Optimizer steps on each rollout batch."""
    pad_multiple: int = 1
    """Token counts are padded to a multiple of it (``config.pad_multiple``)."""
    packed: bool = False
    """True: a micro-batch is one row of sequences end to end. False: padded rows."""
    share_prompts: bool = False
    """True: completions of a group share one copy of their prompt; needs ``packed``."""

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """``updates_per_rollout`` optimizer steps on the groups of all ranks.

        Args:
            groups: this data-parallel rank's, with advantages.

        Returns:
            Metrics, the same on all ranks. Those of the first optimizer step where there are several, except
            ``loss``, ``grad_norm`` and ``lr``, which are the last one's.

        Raises:
            ParityError: on all ranks; more tokens were masked than ``algorithm.max_masked_fraction``.
        """
        batches, shape_metrics = self._microbatches(groups)
        batches = self._scored(batches)
        nonfinite = shape_metrics.pop("nonfinite_fraction")
        metrics: dict[str, float] = {}
        optimization = self.policy.optimization
        for _ in range(self.updates_per_rollout):
            step = _means(optimization.train_step(batches, self._loss))
            masked = step.get("masked_fraction", 0.0)
            if nonfinite or "masked_fraction" in step:  # masks see the others only; NaN: there are none
                more = 0.0 if math.isnan(masked) else masked * (1.0 - nonfinite)
                step["masked_fraction"] = self._check_masked(nonfinite + more)
            metrics = {**step, **metrics, **{key: step[key] for key in ("loss", "grad_norm", "lr")}}
        optimization.finish_updates()
        return {**metrics, **shape_metrics}

    def _check_masked(self, fraction: float) -> float:
        limit = self.objective.config.max_masked_fraction
        if limit is not None and fraction > limit:
            raise ParityError(
                f"{fraction:.1%} of the tokens were masked, more than algorithm.max_masked_fraction={limit}: the "
                "engine samples from another policy than the one that is trained, and masks would hide it. Look at "
                "parity/mult_prob_error and rollout/lag; wider bands (algorithm.token_mask, sequence_mask) if that is "
                "meant. No checkpoint was written of this step"
            )
        return fraction

    def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        """Compare the engine's log-probs with the learner's on the same tokens, without training: the parity gate.

        Returns:
            ``parity/mult_prob_error`` and ``parity/gen_kl`` over all ranks; NaN where there is no token.

        Raises:
            ParityError: on all ranks; some of the engine's log-probs are not finite.
        """
        everything = [group.replace(advantages=np.ones(len(group.completions))) for group in groups]
        batches, shape_metrics = self._microbatches(everything)
        if nonfinite := shape_metrics["nonfinite_fraction"]:
            raise ParityError(
                f"{nonfinite:.1%} of the tokens that the engine sampled have log-probs that are not finite: look at "
                "its dtype and its sampling"
            )
        pairs = zip(self.policy.score(batches), batches, strict=True)
        differences = [scored - batch.rollout_logprobs.cpu().numpy() for scored, batch in pairs]
        difference = np.concatenate([d.astype(np.float64) for d in differences])
        sums = {
            "tokens": float(len(difference)),
            "parity/abs_logprob_difference": float(np.abs(difference).sum()),
            "parity/kl": float((np.expm1(difference) - difference).sum()),
        }
        # the ranks of a context-parallel group have all scored the same tokens
        everyone = parallel.gather_data_parallel(sums)[:: parallel.context_parallel_size()]
        total = [sum(part[key] for part in everyone) for key in sums]
        return _parity(dict(zip(sums, total, strict=True)))

    def token_figures(self, groups: Sequence[Group], first: Sequence[int]) -> dict[int, np.ndarray]:
        """The learner's log-probs and entropies of the tokens of some completions, without training.

        Args:
            groups: this data-parallel rank's.
            first: of each group, the number that names its first completion in the whole job, below 2**24; the others
                follow.

        Returns:
            Number of a completion -> float32 [2, T], its log-probs and entropies; all ranks', on every rank.
        """
        batches, _ = self._microbatches([_numbered(group, start) for group, start in zip(groups, first, strict=True)])
        everyone = parallel.gather_data_parallel(self.policy.figures(batches))
        columns = np.hstack([part for parts in everyone for part in parts])
        if not columns.size:
            return {}
        columns = columns[:, np.lexsort((columns[1], columns[0]))]  # by completion, then by place in it
        numbers, starts = np.unique(columns[0], return_index=True)
        return dict(zip((numbers.astype(int) - 1).tolist(), np.split(columns[2:], starts[1:], axis=1), strict=True))

    # ------------------------------------------------------------------ micro-batches

    def _microbatches(self, groups: Sequence[Group]) -> tuple[list[MicroBatch], dict[str, float]]:
        """This rank's micro-batches of the whole optimizer batch, weighted by the global denominator; and metrics."""
        # What could not be scored is as if it had never been sampled: it has no part in any count.
        samples = [_samples(group) for group in groups]
        dead = [bool(zero_advantage(group.final_advantages[None])[0]) for group in groups]
        # A completion without a gradient still counts in the denominator: leaving it out must not change the loss.
        kept = [
            [sample for sample in row if len(sample.completion_ids)]
            for row, is_dead in zip(samples, dead, strict=True)
            if self.objective.learns_without_advantage or not is_dead
        ]
        counts = parallel.gather_data_parallel(
            (
                sum(len(sample.completion_ids) for row in samples for sample in row),
                sum(map(len, samples)),
                sum(map(bool, samples)),
                sum(dead),
                sum(sample.length for row in kept for sample in row),
                sum(len(sample.completion_ids) for row in kept for sample in row),
                sum(int((~np.isfinite(sample.rollout_logprobs)).sum()) for row in kept for sample in row),
            )
        )
        total_tokens, total_sequences, total_groups, dead_groups, kept_tokens, trained_tokens, nonfinite = map(
            sum, zip(*counts, strict=True)
        )
        own = [group for row in kept for group in self._prefix_groups(row, kept_tokens)]
        mine, layout_metrics = self._distribute(own)
        alpha = self.objective.alpha(total_groups, dead_groups)
        batches = []
        for members in mine:
            lengths = [len(sample.completion_ids) for group in members for sample in group.samples]
            weights = alpha * self.objective.token_weights(
                lengths, total_tokens=total_tokens, total_sequences=total_sequences
            )
            batches.append(
                collate(
                    members,
                    weights,
                    multiple=self.pad_multiple,
                    device=device(),
                    packed=self.packed,
                    context_parallel_size=parallel.context_parallel_size(),
                )
            )
        return batches, {
            **layout_metrics,
            "microbatches": float(len(batches)),
            "alpha": alpha,
            "nonfinite_fraction": nonfinite / max(trained_tokens, 1),
        }

    @property
    def _row_multiple(self) -> int:
        """What ``collate`` pads a row to."""
        return math.lcm(self.pad_multiple, chunks(parallel.context_parallel_size()))

    def _prefix_groups(self, samples: Sequence[Sample], kept_tokens: int) -> list[PrefixGroup]:
        """The samples of one prompt as the units that are distributed over micro-batches and ranks.

        Args:
            kept_tokens: tokens of the sequences of all ranks. Where there are several shares, no unit is more than half
                of a share: so even a few groups can be spread evenly.
        """
        if not self.share_prompts:
            return PrefixGroup.separate(samples)
        budget = self.max_tokens_per_microbatch // self._row_multiple * self._row_multiple
        ranks = parallel.batch_parallel_size()
        return PrefixGroup.split(samples, budget if ranks == 1 else min(budget, kept_tokens // (2 * ranks)))

    def _distribute(self, groups: Sequence[PrefixGroup]) -> tuple[list[list[PrefixGroup]], dict[str, float]]:
        """This rank's micro-batches, after prefix groups have moved to the ranks that the plan assigns; and metrics."""
        sizes = parallel.gather_data_parallel([(group.sequence_tokens, group.row_tokens) for group in groups])
        first = sum(len(part) for part in sizes[: parallel.data_parallel_rank()])
        lengths, row_lengths = ([pair[k] for part in sizes for pair in part] for k in (0, 1))
        ranks = parallel.context_parallel_size()
        assigned = plan(
            [pad_to(length, chunks(ranks)) for length in lengths],
            budget=self.max_tokens_per_microbatch,
            data_parallel_size=parallel.batch_parallel_size(),
            multiple=self._row_multiple,
            packed=self.packed,
        )
        outgoing: list[list[tuple[int, PrefixGroup]]] = []
        for batches in assigned:
            wanted = {i for batch in batches for i in batch}
            share = [(first + k, group) for k, group in enumerate(groups) if first + k in wanted]
            outgoing += [share] * ranks  # neighbours, which will cut every sequence among them, all need it
        by_index = dict(parallel.exchange_data_parallel(outgoing))
        everything = [batch for part in assigned for batch in part]
        return [[by_index[i] for i in batch] for batch in assigned[parallel.batch_parallel_rank()]], {
            "padding_fraction": padding_fraction(everything, row_lengths, self._row_multiple, self.packed),
            "shared_prompt_fraction": 1.0 - sum(row_lengths) / max(sum(lengths), 1),
        }

    def _scored(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Add the log-probs that the loss needs besides the current ones: old ones, and the reference's.

        Old ones replay the routes that the micro-batches have, as the update will.
        """
        if self.updates_per_rollout > 1 and self.objective.algorithm.needs_old_logprobs:
            scored = self.policy.score(batches)
            batches = [b.replace(old_logprobs=_like(s, b)) for b, s in zip(batches, scored, strict=True)]
        if self.objective.algorithm.needs_reference_logprobs:
            # The reference is a model of its own: it sends tokens to the experts that it chooses itself.
            with self.policy.reference_weights():
                scored = self.policy.score([batch.replace(routes=None) for batch in batches])
            batches = [b.replace(reference_logprobs=_like(s, b)) for b, s in zip(batches, scored, strict=True)]
        return batches

    def _loss(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tokens = Tokens(
            logprobs,
            batch.advantages,
            batch.weights,
            batch.rollout_logprobs,
            old_logprobs=batch.old_logprobs,
            reference_logprobs=batch.reference_logprobs,
            entropy=entropy,
            lengths=batch.lengths,
            versions=batch.versions,
            reduce=parallel.add_over_context if parallel.context_parallel_size() > 1 else None,
        )
        value, sums = self.objective.token_loss(tokens)
        with torch.no_grad():
            return value, {**sums, "entropy": entropy.sum()}


def _samples(group: Group) -> list[Sample]:
    """The completions of a group that have an advantage; those that could not be scored have none."""
    return [
        Sample(
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            advantage=float(advantage),
            versions=completion.token_versions,
            routes=completion.routes,
        )
        for completion, advantage in zip(group.completions, group.final_advantages, strict=True)
        if not np.isnan(advantage)
    ]


def _numbered(group: Group, first: int) -> Group:
    """A group whose samples say who they are wherever they go: the advantage is 1 + the completion's number, and the
    engine's log-prob of a token is its place in the completion."""
    marked = [
        dataclasses.replace(completion, logprobs=np.arange(len(completion.token_ids), dtype=np.float32))
        for completion in group.completions
    ]
    return group.replace(completions=tuple(marked), advantages=np.arange(len(marked)) + first + 1.0)


def _like(scored: np.ndarray, batch: MicroBatch) -> torch.Tensor:
    return torch.from_numpy(scored).to(batch.rollout_logprobs)


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Turn the loss function's sums into metrics: means per token; minima and a few others stay as they are."""
    unchanged = ("loss", "grad_norm", "lr")
    tokens = sums["tokens"] or math.nan  # where no group carries a gradient, there are no tokens to average over
    metrics = {key: sums[key] for key in unchanged}
    metrics |= {
        key: value / tokens
        for key, value in sums.items()
        if key not in (*unchanged, "tokens") and not key.startswith(("min/", "parity/", "router/"))
    }
    metrics |= {key: value for key, value in sums.items() if key.startswith("router/")}
    metrics |= {key.removeprefix("min/"): value for key, value in sums.items() if key.startswith("min/")}
    return {**metrics, **_parity(sums)}


def _parity(sums: dict[str, float]) -> dict[str, float]:
    """``parity/mult_prob_error``: exp of the mean absolute difference; ``parity/gen_kl``: KL(engine, learner), k3."""
    tokens = sums["tokens"] or math.nan
    return {
        "parity/mult_prob_error": math.exp(min(sums["parity/abs_logprob_difference"] / tokens, 50.0)),
        "parity/gen_kl": sums["parity/kl"] / tokens,
    }
