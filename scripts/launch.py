"""Starts all ranks of a run: ``python scripts/launch.py cluster=local trainer.devices=4 KEY=VALUE ...``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.entry import config_main
from nemo_aapo.launch import local
from nemo_aapo.policy.model_dir import check_model
from nemo_aapo.run_directory import check_run_directory

TRAIN = Path(__file__).with_name("train.py")


def check(config: Config) -> None:
    """Refuse here what every rank would refuse: model, layout, run directory."""
    check_model(config, config.trainer.num_nodes * config.trainer.devices)
    check_run_directory(config)


def launch(config: Config, tree: dict[str, Any]) -> int:
    return local.launch(config, [sys.executable, str(TRAIN), *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(
        config_main(launch, description="Start the ranks of a training run.", check=check, through_nemo=False)
    )
