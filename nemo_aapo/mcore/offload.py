"""GPU memory of the learner, lent to a rollout engine on the same GPU while it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from nemo_aapo.mcore.optimizer import parts

GIB = 2**30


class LearnerOffload:
    """Moves what only the learner needs out of GPU memory and back: gradients, fp32 main weights, Adam's moments.

    Weights stay: the in-process engine reads them, and any other one is refitted from them. Gradients are dropped,
    not moved: a training step begins by clearing them.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: MegatronOptimizer, note: Callable[[str], None]
    ) -> None:
        """Args:
        optimizer: with main weights of its own (bf16 weights): fp32 ones would take the model's with them.
        note: told once what it saves.
        """
        self._model, self._optimizer, self._note = model, optimizer, note
        self._told = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, they are in host memory. Not collective."""
        before = torch.cuda.memory_allocated()
        self._optimizer.offload_to_cpu()
        self._model.offload_grad_buffers()
        try:
            # before the first update there are no moments yet
            if not self._told and any(part.optimizer.state for part in parts(self._optimizer)):
                self._told = True
                after = torch.cuda.memory_allocated()
                self._note(
                    f"rollout.offload_learner: {before / GIB:.2f} GiB of GPU memory before, {after / GIB:.2f} GiB "
                    "while the engine draws"
                )
            yield
        finally:
            self._model.restore_grad_buffers()
            self._optimizer.restore_from_cpu()
