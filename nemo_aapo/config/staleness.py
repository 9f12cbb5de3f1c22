"""What a configuration can be refused for that trains on rollouts of earlier policies, in order or in flight."""

from __future__ import annotations

from nemo_aapo.config.schema import Config
from nemo_aapo.errors import ConfigError


def check_staleness(config: Config) -> None:
    """Refuse settings that can't go with ``rollout.async_depth`` or ``rollout.max_lag``.

    Raises:
        ConfigError: names both and the remedy.
    """
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.recompute_kv and rollout.max_lag is None:
        raise ConfigError("rollout.recompute_kv=true has no effect with rollout.max_lag=null: set it to false")
    asked = f"rollout.async_depth={rollout.async_depth}"
    if rollout.max_lag is not None:
        asked = f"rollout.max_lag={rollout.max_lag}"
        _check_in_flight(config, asked)
    elif rollout.async_depth == 0:
        return
    if algorithm.importance_weight_cap is None:
        raise ConfigError(
            f"{asked} trains on rollouts of an earlier policy: set algorithm.importance_weight_cap "
            "(2.0, say), or the loss takes them for its own"
        )
    if algorithm.reference == "online" and rollout.engine == "remote":
        raise ConfigError(
            f"{asked} with algorithm.reference=online: the servers can't sample from reference and "
            "policy at a time. Use algorithm.reference=cached"
        )
    if rollout.async_depth > 1 and config.data.sampling != "uniform":
        raise ConfigError(
            f"{asked} with data.sampling={config.data.sampling}: which prompts a step takes would "
            "depend on steps that are not trained on yet when it begins. Use data.sampling=uniform, or a depth of 1"
        )
    if rollout.async_depth > 1 and rollout.refit == "collective":
        raise ConfigError(
            f"rollout.refit=collective with {asked}: servers take weights at "
            "different times then, and the trainer has the newest only. Use rollout.refit=files or delta"
        )


def _check_in_flight(config: Config, asked: str) -> None:
    rollout = config.rollout
    if rollout.async_depth:
        raise ConfigError(
            f"{asked} with rollout.async_depth={rollout.async_depth}: rollouts are in flight or in order. Set one of "
            "them, async_depth to 0 or max_lag to null"
        )
    if rollout.replay is not None:
        raise ConfigError(f"{asked} has no effect with rollout.replay, which has no engine: set it to null")
    if rollout.engine != "remote":
        raise ConfigError(
            f"{asked} needs rollout servers (rollout.engine=remote): with rollout.engine={rollout.engine} nobody "
            "learns while the engine generates. Use rollout.async_depth there"
        )
    if rollout.server.engine != "megatron":
        raise ConfigError(
            f"{asked} with rollout.server.engine={rollout.server.engine}: only Megatron's engine takes new weights "
            "between two tokens. Use rollout.async_depth"
        )
    if rollout.refit in ("collective", "ipc"):
        raise ConfigError(
            f"{asked} with rollout.refit={rollout.refit}: servers would answer by weights that not all ranks of the "
            "trainer know of yet. Use rollout.refit=files or delta"
        )
    if rollout.speculation:
        raise ConfigError(
            f"{asked}: prompts come while others are generated, for which nothing is guessed, so that "
            "rollout.speculation=true has no effect. Leave it at null"
        )
    if config.data.sampling != "uniform":
        raise ConfigError(
            f"{asked} with data.sampling={config.data.sampling}: which prompts a step takes would depend on steps that "
            "are not trained on yet. Use data.sampling=uniform"
        )
