"""The policy: a Megatron GPTModel under TP x PP x DP with its weight map and, where it trains, an optimization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nemo_aapo.config import Config, ModelShape
from nemo_aapo.learner.optimization import Optimization
from nemo_aapo.learner.passes import TokenPasses
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.bridge.lora import add_adapters
from nemo_aapo.mcore.bridge.weights import WeightMap
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.model import build_module
from nemo_aapo.mcore.optimizer import moments_to_come
from nemo_aapo.mcore.state import load_model_state, sharded_model_state


class MegatronPolicy:
    """One policy, spread over the job's ranks. All methods are collective unless they say otherwise.

    It scores and is exported as it is. ``prepare_training`` adds the gradient buffers and the optimizer, which take
    several times the memory of the weights.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        """Build the model and load its Hugging Face weights.

        Args:
            config: the run's configuration, its precision decided (``prepare``).
            shape: the model's, as ``read_model_dir`` returned it.
        """
        self.config, self.shape = config, shape
        self.weight_map = WeightMap(config.model.path, precision.dtype(config))
        self.module = build_module(config, self.weight_map)
        self.weight_map.load(self.module)
        if config.model.lora is not None:
            add_adapters(self.module, config.model.lora, config.seed)
        self.passes = TokenPasses(config, self.module, shape.vocab_size)
        self._optimization: Optimization | None = None
        self._reference: list[torch.Tensor] | None = None

    def prepare_training(self) -> None:
        """Add gradient buffers and optimizer."""
        self._optimization = Optimization(self.config, self.passes)

    @property
    def trains(self) -> bool:
        """Whether there is an ``optimization``."""
        return self._optimization is not None

    @property
    def optimization(self) -> Optimization:
        """What updates the weights.

        Raises:
            RuntimeError: ``prepare_training`` was not called.
        """
        if self._optimization is None:
            raise RuntimeError("this policy only generates and scores: prepare_training() was not called")
        return self._optimization

    @property
    def version(self) -> int:
        """Optimizer steps taken so far."""
        return self._optimization.updates if self._optimization else 0

    def score(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Log-probs of the completion tokens at the sampling temperature, without gradients.

        Returns:
            float32 [n] for each micro-batch, in the order of its targets, on every rank of the model-parallel group.
        """
        return self.passes.score(batches, self._optimization.model if self._optimization else None)

    def figures(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """What is known of the completion tokens: ``TokenPasses.figures``."""
        return self.passes.figures(batches, self._optimization.model if self._optimization else None)

    # ------------------------------------------------------------------ weights

    def keep_reference(self) -> None:
        """Remember the present weights as the frozen reference (a copy of this rank's part, in host memory).

        Only of the weights that are trained: those below adapters stay what they are. Called before the first update.
        """
        self._reference = [parameter.detach().cpu().clone() for parameter in self._trained_parameters()]

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Inside, the model computes with the reference's weights; afterwards the policy's are back, bit for bit."""
        if self._reference is None:
            raise RuntimeError("keep_reference() was not called: there are no reference weights")
        parameters = self._trained_parameters()
        policy = [parameter.data.clone() for parameter in parameters]
        try:
            for parameter, frozen in zip(parameters, self._reference, strict=True):
                parameter.data.copy_(frozen)
            yield
        finally:
            for parameter, kept in zip(parameters, policy, strict=True):
                parameter.data.copy_(kept)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor where the weights lie), for refit and export."""
        return self.weight_map.export(self.module)

    def moments_to_come(self) -> int:
        """Bytes that Adam's moments will take on this rank's device from the first update on; 0 once they are there."""
        return moments_to_come(self._optimization.optimizer) if self._optimization else 0

    def export(self, directory: str, stop: Callable[[], bool] = bool) -> None:
        """Write a Hugging Face model directory.

        Raises:
            Interrupted: ``stop``, which is asked on every rank now and then, was true on one.
        """
        self.weight_map.save(self.module, directory, stop=stop)

    # ------------------------------------------------------------------ checkpoints

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and scheduler for mcore's dist_checkpointing: loads under any TP x PP x DP."""
        model = sharded_model_state(self.module)
        return {"model": model, **self.optimization.sharded_state_dict(model, is_loading)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``dist_checkpointing.load`` read into ``sharded_state_dict(is_loading=True)``."""
        load_model_state(self.module, state["model"])
        self.optimization.load_state_dict(state)
