"""What training adds to a policy's model: gradient buffers, an optimizer with its state, and a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.errors import NonFiniteError
from nemo_aapo.learner.passes import TokenLoss, TokenPasses
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.optimizer import (
    CHECKPOINT_METADATA,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    data_parallel,
    prepare_to_load,
)
from nemo_aapo.mcore.passes import connect
from nemo_aapo.trace import spans


class Optimization:
    """Updates a module's weights. All methods are collective unless they say otherwise."""

    def __init__(self, config: Config, passes: TokenPasses) -> None:
        """Make gradient buffers and optimizer; several times the memory that the weights take.

        Args:
            passes: of the module that is trained.
        """
        self.config, self.passes = config, passes
        self.updates = 0
        """Optimizer steps taken so far."""
        self.fused_weight_gradients = precision.fuse_weight_gradients(passes.module)
        """Layers that add their weight gradients to the buffer by themselves."""
        self.model = data_parallel(config, passes.module)
        """The module in its gradient buffers."""
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        connect(self.model, self.optimizer)

    def train_step(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> dict[str, float]:
        """One optimizer step on this data-parallel rank's micro-batches (the same number on every rank).

        Args:
            batches: this rank's share of the optimizer batch; their weights hold 1 / (global denominator).
            loss: summed over all micro-batches of all ranks it is the loss.

        Returns:
            The loss, ``grad_norm`` (before clipping), ``lr``, and the loss function's sums over all ranks (keys that
            start with ``min/`` are minima).

        Raises:
            NonFiniteError: on all ranks, before any weight is touched.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.passes.train(batches, loss, self.model)
        with spans.span("gradient norm"):
            self.optimizer.prepare_grads()
            grad_norm = clip_gradients(self.optimizer)
        if not math.isfinite(sums["loss"]) or not math.isfinite(grad_norm):
            raise NonFiniteError(f"loss {sums['loss']}, gradient norm {grad_norm}")
        self.scheduler.step(1)
        lr = self.optimizer.param_groups[0]["lr"]
        with spans.span("optimizer step"):
            self.optimizer.step_with_ready_grads()
        self.updates += 1
        return {**sums, "grad_norm": grad_norm, "lr": lr}

    def finish_updates(self) -> None:
        """Have the updated weights in place; with ``overlap_param_gather`` the next forward pass would gather them."""
        if self.config.model.optim.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def sharded_state_dict(self, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """Optimizer and scheduler for mcore's dist_checkpointing.

        Args:
            model: the model's own sharded state, by which the optimizer names its parts.
        """
        if is_loading:
            prepare_to_load(self.optimizer)
        return {
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=CHECKPOINT_METADATA),
            "scheduler": self.scheduler.state_dict(),
            "version": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was read into ``sharded_state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.num_steps = 0  # mcore adds the loaded steps to it
        self.scheduler.load_state_dict(state["scheduler"])
        self.updates = state["version"]
