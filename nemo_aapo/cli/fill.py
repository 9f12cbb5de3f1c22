"""Fills the store of reference rewards: ``python scripts/reference_rewards.py [OPTIONS] KEY=VALUE ...``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.cli.main import command_of_ranks, exit_code, run_command
from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.launch.world import Machine, World, of_starter
from nemo_aapo.prepare import Job, prepare_fill
from nemo_aapo.prepare.job import FillTask
from nemo_aapo.reference_store.shards import Shard

DESCRIPTION = """Draw the reference rewards that a training run with these settings needs, and store them
(algorithm.reference_store). It goes on where it was interrupted; a run then finds all of them there.

  (no option)            fill the store; with trainer.devices=N on N ranks of this machine, or under torchrun
  --shard I --shards N   fill the I-th of N parts (I from 0) into a file of its own: one task of an array job
  --merge                join the parts' files into the store; exit code 1 if rewards are missing then
  --status               say how much is stored; exit code 1 if rewards are missing"""


@dataclass(frozen=True)
class Options:
    """What is done with the store."""

    task: FillTask
    shard: Shard | None

    def world(self, config: Config) -> World:
        """The ranks that fill it. Looking and merging is for one process, wherever and however the run is started."""
        if self.task == "fill":
            return of_starter(config)
        return World(config.trainer.num_nodes * config.trainer.devices, Machine.present())


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return exit_code(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    options, settings = read_options(words)
    return run_command(
        lambda command: prepare_fill(command, options.world, options.task, options.shard),
        functools.partial(fill, options=options, words=words),
        description=DESCRIPTION,
        words=settings,
    )


def fill(job: Job, options: Options, words: Sequence[str]) -> int:
    """What the options ask for, on this rank or on ranks that are given the same words."""
    trainer = job.config.trainer
    if options.task == "fill" and local.starts_ranks(trainer.devices, trainer.num_nodes):
        name = "reference_rewards" if options.shard is None else f"reference_rewards_{options.shard.index}"
        log_dir = Path(job.config.run.dir) / "logs" / name
        return local.run_ranks_of(job.config, command_of_ranks("fill", words), log_dir)
    from nemo_aapo.jobs import fill_reference  # torch and Megatron

    if options.task == "merge":
        return fill_reference.merge(job)
    if options.task == "status":
        return fill_reference.status(job)
    return fill_reference.fill(job, options.shard)


def read_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's own options, and the other words.

    Raises:
        ConfigError, argparse.ArgumentError: options that don't go together, or no numbers.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shard", type=int)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--status", action="store_true")
    given, others = parser.parse_known_args(words)
    if (given.shard is None) != (given.shards is None):
        raise ConfigError("--shard I and --shards N go together")
    if given.merge + given.status + (given.shard is not None) > 1:
        raise ConfigError("--shard, --merge and --status: one at a time")
    shard = None if given.shard is None else Shard(given.shard, given.shards)
    return Options("merge" if given.merge else "status" if given.status else "fill", shard), others
