"""A model's passes as the learner takes them: from micro-batches to log-probs and entropies of their tokens.

The passes go through mcore's pipeline schedule. On the last stage the model hands out hidden states instead of logits,
and ``learner/logprobs.py`` turns them into log-probs chunk by chunk: scoring and training share that one path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.learner.logprobs import selected_logprobs
from nemo_aapo.mcore import passes
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.model import GPTModel, vocabulary_shard
from nemo_aapo.mcore.optimizer import DistributedDataParallel

TokenLoss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""``loss(logprobs [n], entropy [n], batch)`` -> (this micro-batch's part of the loss, detached sums for metrics)."""


@dataclass(frozen=True, slots=True)
class TokenPasses:
    """Passes of one module; collective over all ranks."""

    config: Config
    module: GPTModel
    vocab_size: int
    """The true vocabulary: Megatron pads the output layer."""

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch], wrapped: DistributedDataParallel | None = None) -> list[np.ndarray]:
        """Log-probs of the completion tokens at the sampling temperature, without gradients.

        Args:
            wrapped: the module in its gradient buffers, where it trains.

        Returns:
            float32 [n] for each micro-batch, in the order of its targets, on every rank of the model-parallel and the
            context-parallel group.
        """

        def logprobs(hidden: torch.Tensor, batch: MicroBatch) -> np.ndarray:
            return self._logprobs(hidden, batch)[0].cpu().numpy()

        scored = passes.forward(self.module, _own_parts(batches), logprobs, wrapped)
        scored = parallel.broadcast_from_last_stage(scored)
        if parallel.context_parallel_size() == 1:
            return scored
        everyone = parallel.gather_context_parallel(scored)
        return [batch.whole(parts) for batch, *parts in zip(batches, *everyone, strict=True)]

    @torch.no_grad()
    def figures(
        self, batches: Sequence[MicroBatch], wrapped: DistributedDataParallel | None = None
    ) -> list[np.ndarray]:
        """What is known of the completion tokens, by rows, without gradients.

        Returns:
            float32 [4, n] for each micro-batch, on every pipeline stage: the tokens' advantages and rollout log-probs
            as they came, and the model's log-probs and entropies (nats). n counts the tokens that this rank computes:
            its part, where context parallelism cuts sequences.
        """

        def table(hidden: torch.Tensor, batch: MicroBatch) -> np.ndarray:
            computed = self._logprobs(hidden, batch)
            return torch.stack([batch.advantages, batch.rollout_logprobs, *computed]).float().cpu().numpy()

        return parallel.broadcast_from_last_stage(passes.forward(self.module, _own_parts(batches), table, wrapped))

    def train(
        self, batches: Sequence[MicroBatch], loss: TokenLoss, wrapped: DistributedDataParallel
    ) -> dict[str, float]:
        """Add the gradient of the loss to the buffers of ``wrapped``, over all ranks.

        Args:
            batches: this rank's share of the optimizer batch; their weights hold 1 / (global denominator). Of each the
                rank computes its part, where context parallelism cuts them: sums over tokens add up all the same.
            loss: summed over all micro-batches of all ranks it is the loss.

        Returns:
            ``loss`` and the loss function's sums over all ranks (keys that start with ``min/`` are minima), and the
            routers' metrics. With ``rollout.replay_routes`` also ``router/replay_disagreement``: of the (token, layer)
            choices replayed, the share in which the router would have chosen other experts; NaN if none was.
        """

        def loss_of_hidden(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return loss(*self._logprobs(hidden, batch), batch)

        outputs, replayed, routed = passes.forward_and_backward(
            self.module, _own_parts(batches), loss_of_hidden, wrapped
        )
        own = merge([{key: float(value) for key, value in output.items()} for output in outputs])
        sums = merge(parallel.gather_data_parallel(parallel.broadcast_from_last_stage(own))) | routed
        if self.config.rollout.replay_routes:
            known, otherwise = parallel.sum_over_ranks(*replayed)
            sums["router/replay_disagreement"] = otherwise / known if known else math.nan
        return sums

    def _logprobs(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [s, b, h] (cut along s under sequence parallelism) -> log-probs and entropy [n]."""
        shard = vocabulary_shard(self.module)
        whole = passes.whole_hidden(hidden, self.config.model.sequence_parallel)
        selected = whole.flatten(0, 1).index_select(0, batch.positions)
        return selected_logprobs(
            selected.to(shard.weight.dtype),
            shard.weight,
            batch.targets,
            temperature=self.config.rollout.temperature,
            vocab_size=self.vocab_size,
            tp_group=shard.group,
            vocab_start=shard.start,
            chunk_tokens=self.config.model.logprob_chunk_tokens,
            entropy_gradient=self.config.algorithm.needs_entropy_gradient,
        )


def _own_parts(batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """What this rank computes of each micro-batch."""
    if parallel.context_parallel_size() == 1:
        return batches
    return [batch.part(parallel.context_parallel_rank()) for batch in batches]


def merge(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums key by key, in one fixed order; minima for keys that start with ``min/``."""
    merged: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            if key not in merged:
                merged[key] = value
            else:
                merged[key] = min(merged[key], value) if key.startswith("min/") else merged[key] + value
    return merged
