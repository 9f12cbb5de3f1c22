"""Fills the store of reference rewards: ``python scripts/reference_rewards.py [OPTIONS] KEY=VALUE ...``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_aapo.cli.main import config_main, exit_code
from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.models.directory import check_model
from nemo_aapo.prepare.job import resolve
from nemo_aapo.reference_store.shards import Shard

DESCRIPTION = """Draw the reference rewards that a training run with these settings needs, and store them
(algorithm.reference_store). It goes on where it was interrupted; a run then finds all of them there.

  (no option)            fill the store; with trainer.devices=N on N ranks of this machine, or under torchrun
  --shard I --shards N   fill the I-th of N parts (I from 0) into a file of its own: one task of an array job
  --merge                join the parts' files into the store; exit code 1 if rewards are missing then
  --status               say how much is stored; exit code 1 if rewards are missing"""


def main(argv: list[str]) -> int:
    return exit_code(lambda: run(argv))


def run(argv: list[str]) -> int:
    """What the options ask for; the exit code."""
    options, words = read_options(argv)

    def check(config: Config) -> None:
        if config.algorithm.reference != "cached":
            mode = config.algorithm.reference or "null"
            raise ConfigError(f"algorithm.reference={mode}: only cached reference rewards are stored (algorithm=aapo)")
        asked = config.trainer.num_nodes * config.trainer.devices
        check_model(config, local.world_size_of(config) if options.fills else asked)

    def task(config: Config, tree: dict[str, Any]) -> int:
        if options.fills and local.starts_ranks(config.trainer.devices, config.trainer.num_nodes):
            return start_ranks(config, argv, options.shard)
        from nemo_aapo.jobs import fill_reference as reference_job  # torch and Megatron

        asked = config.trainer.num_nodes * config.trainer.devices
        job = resolve(config, local.world_size_of(config) if options.fills else asked, tree)
        if options.merge:
            return reference_job.merge(job)
        if options.status:
            return reference_job.status(job)
        return reference_job.fill(job, options.shard)

    return config_main(task, description=DESCRIPTION, argv=words, check=check, through_nemo=False)


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own options, and the other words.

    Raises:
        ConfigError, argparse.ArgumentError: options that don't go together, or no numbers.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shard", type=int)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--status", action="store_true")
    options, words = parser.parse_known_args(argv)
    if (options.shard is None) != (options.shards is None):
        raise ConfigError("--shard I and --shards N go together")
    if options.merge + options.status + (options.shard is not None) > 1:
        raise ConfigError("--shard, --merge and --status: one at a time")
    options.shard = None if options.shard is None else Shard(options.shard, options.shards)
    options.fills = not (options.merge or options.status)
    return options, words


def start_ranks(config: Config, argv: list[str], shard: Shard | None) -> int:
    """This command once more as ``trainer.devices`` ranks; their exit code."""
    name = "reference_rewards" if shard is None else f"reference_rewards_{shard.index}"
    return local.run_ranks_of(config, [sys.executable, __file__, *argv], Path(config.run.dir) / "logs" / name)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
