"""What weights are called between trainer and rollout servers, and where they are. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aapo.engines.collective.plan import Rendezvous


@dataclass(frozen=True)
class WeightsId:
    """Names weights: two runs may have the same version of different ones.

    Example: ``WeightsId(5, "1a2b3c4d...")``, shown as ``policy version 5 (1a2b3c4d)``.
    """

    policy_version: int
    """Number of optimizer steps behind them."""
    digest: str
    """Of their manifest, tensors or numbers, as ``rollout.refit`` proves them; ``model_digest`` of the base model."""

    def __str__(self) -> str:
        return f"policy version {self.policy_version} ({self.digest[:8]})"


@dataclass(frozen=True)
class Weights:
    """Weights and where they lie.

    Example: ``Weights(WeightsId(5, "1a2b..."), "weights/v5-1a2b3c4d/manifest.json")``
    """

    id: WeightsId
    manifest: str | None
    """Path relative to the directory that trainer and servers both see; None: the base model, ``model.path``."""
    sent: bool = False
    """The trainer's ranks send them; there is nothing to read."""
    rendezvous: Rendezvous | None = None
    """Where they do."""
