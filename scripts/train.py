"""Trains a policy: ``python scripts/train.py KEY=VALUE ...``, alone or under torchrun; ``--help`` says more."""

from __future__ import annotations

from typing import Any

from nemo_aapo.cli.main import config_main
from nemo_aapo.config import Config
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.local import world_size_of_job
from nemo_aapo.models.directory import check_model
from nemo_aapo.prepare.job import resolve
from nemo_aapo.run.directory import check_run_directory
from nemo_aapo.utils.libraries import importing


def check(config: Config) -> None:
    """Refuse what can be refused without NeMo: model, layout, engine, run directory."""
    if config.rollout.engine == "trtllm":
        trtllm_settings.check(config)
    if config.dry_run:
        raise ConfigError("dry_run=true has an effect with scripts/launch.py only")
    check_model(config, world_size_of_job())
    check_run_directory(config)


def train(config: Config, tree: dict[str, Any]) -> int:
    with importing():
        from nemo_aapo.jobs import train as training_job  # torch and Megatron

    return training_job.train(resolve(config, world_size_of_job(), tree))


if __name__ == "__main__":
    raise SystemExit(
        config_main(
            train, description="Train a policy with AAPO: one rank (scripts/launch.py starts many).", check=check
        )
    )
