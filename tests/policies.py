"""A real policy of a tiny model in a rank of the tests."""

from __future__ import annotations

from typing import Any


def make_policy(config: Any, *, trains: bool = True) -> Any:
    """``MegatronPolicy`` of the model that a configuration names, decided for this machine. Collective.

    Args:
        trains: with gradient buffers and an optimizer.
    """
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.models.directory import read_model_dir

    policy = MegatronPolicy(decide(config, Machine.present()), read_model_dir(config.model.path))
    if trains:
        policy.prepare_training()
    return policy
