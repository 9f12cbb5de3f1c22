"""Routing replay: the learner sends each token to the experts that the rollout engine sent it to.

A router chooses by comparing scores, and scores computed in another batch or on another layout differ in their last
bits: now and then a choice falls otherwise, and what follows differs by more than rounding. Replayed, the same function
is trained that was sampled, on every layout. The experts' weights still come from the learner's own scores, so that the
router gets its gradient (Rollout Routing Replay, arXiv 2510.11370).

mcore's router asks an object at ``router.router_replay`` for its choice. mcore's own (``RouterReplay``) keeps instances
and actions in statics of the class, and has to be told between a forward pass and its recomputation, for which a
pipeline schedule leaves no place; the one here tells them apart by itself, and is gone after the pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_aapo.distributed import parallel
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.types import NO_ROUTE


class RouterReplay:
    """What one layer's router asks. Routes are uint8 [T, k], ``NO_ROUTE`` where the router's own choice holds."""

    def __init__(self, trains: bool) -> None:
        """Args:
        trains: a pass without gradients is the first of two: its layer is computed again before the backward pass.
        """
        self.routes: torch.Tensor | None = None
        """Those of the micro-batch that comes next; None: the router's own choice holds for all of it."""
        self.counted: torch.Tensor | None = None
        """int64 [n], which of its T tokens are counted, once each; None: all."""
        self.known, self.otherwise = torch.zeros(2, dtype=torch.int64)
        """Tokens that had a route, and those of them that the router would have sent elsewhere."""
        self._trains = trains
        self._recomputed: deque[torch.Tensor | None] = deque()  # of passes that will be made again, first in first out

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As mcore calls it: scores [T, experts] -> the scores of the chosen experts, and the experts, both [T, k]."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        again = torch.is_grad_enabled() and bool(self._recomputed)
        routes = self._recomputed.popleft() if again else self.routes
        if self._trains and not torch.is_grad_enabled():
            self._recomputed.append(routes)
        if routes is None:
            return values, own
        chosen = torch.where(routes == NO_ROUTE, own, routes.long())
        if not again:
            self._count(routes != NO_ROUTE, chosen, own)
        return scores.gather(1, chosen), chosen

    def _count(self, known: torch.Tensor, chosen: torch.Tensor, own: torch.Tensor) -> None:
        """Add to the sums, which stay on the device: a number on the host would be waited for in each layer."""
        rows = slice(None) if self.counted is None else self.counted
        differs = chosen[rows].sort(1).values != own[rows].sort(1).values
        self.known = self.known.to(own.device) + known[rows, 0].sum()
        self.otherwise = self.otherwise.to(own.device) + differs.any(1).sum()


class RoutingReplay:
    """The routers of one stage during the passes of some micro-batches; none where these have no routes."""

    def __init__(self, module: GPTModel, batches: Sequence[MicroBatch], trains: bool) -> None:
        """Args:
        trains: each forward pass is followed by a backward pass.
        """
        routed = any(batch.routes is not None for batch in batches)
        layers = module.decoder.layers if routed else ()
        self._routers: dict[int, Any] = {layer.layer_number - 1: layer.mlp.router for layer in layers}
        self._replays = {number: RouterReplay(trains) for number in self._routers}
        self._cut = module.config.sequence_parallel

    def start(self, batch: MicroBatch) -> None:
        """The forward pass of a micro-batch begins."""
        routes, counted = batch.routes, batch.positions
        if routes is not None and self._cut:
            routes = routes.chunk(parallel.tensor_parallel_size())[parallel.tensor_parallel_rank()]
            counted = counted - parallel.tensor_parallel_rank() * len(routes)
            counted = counted[(counted >= 0) & (counted < len(routes))]
        for number, replay in self._replays.items():
            replay.routes = None if routes is None else routes[:, number]
            replay.counted = counted

    def counts(self) -> tuple[float, float]:
        """Choices, of this rank's tokens and layers, that were replayed, and those that would have fallen otherwise.

        Tokens are those that the loss reads, each once for each of its predictions: they are the same on all layouts.
        """
        replays = self._replays.values()
        return float(sum(replay.known for replay in replays)), float(sum(replay.otherwise for replay in replays))

    def __enter__(self) -> RoutingReplay:
        for number, router in self._routers.items():
            router.router_replay = self._replays[number]
        return self

    def __exit__(self, *error: object) -> None:
        for router in self._routers.values():
            router.router_replay = None
