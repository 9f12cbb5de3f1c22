"""What the routers did with a batch, as metrics: how evenly tokens spread over experts, and how sure routers are.

Counted are the tokens that the loss reads, each once for each of its predictions: whatever the layout, and whether rows
are padded or prompts shared, they are the same ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from nemo_aapo.distributed import parallel
from nemo_aapo.mcore.micro_batch import MicroBatch


class RouterWatch:
    """Counts in the routers of one pipeline stage while it is entered; nothing in a dense model."""

    def __init__(self, module: GPTModel) -> None:
        """Args:
        module: this rank's stage.
        """
        config = module.config
        self._routers: dict[int, Any] = (
            {layer.layer_number - 1: layer.mlp.router for layer in module.decoder.layers}
            if config.num_moe_experts
            else {}
        )
        self._per_token, self._cut = config.moe_router_topk, config.sequence_parallel
        self._sums = torch.zeros(config.num_layers, (config.num_moe_experts or 0) + 2, dtype=torch.float64)
        self._positions: torch.Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RouterWatch:
        for number, router in self._routers.items():

            def count(router: Any, given: tuple[Any, ...], made: tuple[Any, ...], number: int = number) -> None:
                self._count(number, router, given[0], made[1])

            self._hooks.append(router.register_forward_hook(count))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def forward_pass(self, batch: MicroBatch) -> Iterator[None]:
        """Inside, tokens are those of a micro-batch. What is computed again before a backward pass is outside."""
        self._positions = batch.positions
        try:
            yield
        finally:
            self._positions = None

    @torch.no_grad()
    def _count(self, layer: int, router: Any, hidden: torch.Tensor, chosen: torch.Tensor) -> None:
        """Args:
        hidden: what the router saw, [s, b, h]; under sequence parallelism this rank's part of s.
        chosen: bool [s * b, experts], without what was dropped.
        """
        if self._positions is None:
            return
        own = self._positions
        if self._cut:
            own = own - parallel.tensor_parallel_rank() * len(chosen)
            own = own[(own >= 0) & (own < len(chosen))]
        scores = F.linear(hidden.flatten(0, 1)[own].float(), router.weight.float()).log_softmax(-1)
        entropy = -(scores.exp() * scores).sum(dtype=torch.float64)
        self._sums[layer, :-2] += chosen[own].sum(0).cpu()
        self._sums[layer, -2:] += torch.stack((entropy.cpu(), torch.tensor(len(own), dtype=torch.float64)))

    def metrics(self) -> dict[str, float]:
        """Means over the layers, of all ranks' tokens; nothing for a dense model. Collective.

        ``router/load``: tokens of a layer's busiest expert over the mean of its experts. ``router/entropy``: of a
        token's distribution over experts, in nats. ``router/dropped``: share of the choices that no expert computed.
        """
        if not self._sums.shape[1] > 2:
            return {}
        every = torch.tensor(parallel.sum_over_ranks(*self._sums.flatten().tolist())).view(self._sums.shape)
        sent, entropy, tokens = every[:, :-2], every[:, -2], every[:, -1]
        if not tokens.all():
            return dict.fromkeys(("router/load", "router/entropy", "router/dropped"), math.nan)
        return {
            "router/load": float((sent.amax(1) / sent.mean(1)).mean()),
            "router/entropy": float((entropy / tokens).mean()),
            "router/dropped": float(1.0 - sent.sum() / (tokens.sum() * self._per_token)),
        }
