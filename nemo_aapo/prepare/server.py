"""What a rollout server is to host: a slice of the training run that it serves. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nemo_aapo.config import Config, ModelShape, parse, with_machine_defaults, with_routes_decided
from nemo_aapo.config.compose import compose
from nemo_aapo.config.sizes import check_server_layout
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import World, check_place, decide, of_rank
from nemo_aapo.models.directory import read_model_dir
from nemo_aapo.prepare.job import Words, command_line
from nemo_aapo.prepare.packages import MEGATRON, check_packages, servers_need
from nemo_aapo.prepare.text import check_tokenizer


@dataclass(frozen=True)
class ServerJob:
    """One engine behind HTTP, whatever the layout of the trainer."""

    config: Config
    """The trainer's, with what it leaves to the machine decided for this one."""
    shape: ModelShape
    """The shape of the model at ``config.model.path``."""

    @property
    def ranks(self) -> int:
        """Processes that it consists of."""
        return self.config.rollout.server.ranks


def prepare_server(words: Words) -> ServerJob:
    """The server that words ask for: those of the training run, with ``rollout.server`` of its own.

    Raises:
        ConfigError: what can't work, with the reason and the remedy. Nothing was written.
    """
    command = command_line(words)
    config = parse(compose(command))  # rewards are the trainer's: it may bring a scorer of its own
    world = of_rank(config)
    check_place(config, command.overrides)
    ranks = config.rollout.server.ranks
    if world.size not in (1, ranks) or (world.size == 1 < ranks and "RANK" in os.environ):
        raise ConfigError(
            f"a rollout server of rollout.server.tensor_parallel_size x pipeline_parallel_size = {ranks} ranks, and "
            f"{world.size} were started: start it without torchrun, or with --nproc-per-node {ranks}; each server by "
            "itself, with its rollout.server.index"
        )
    hosts_trtllm = config.rollout.server.engine == "trtllm"
    if hosts_trtllm:
        trtllm_settings.check(config)
    config = _decided(config, world, hosts_trtllm)
    shape = read_model_dir(config.model.path)
    check_server_layout(config, shape)
    config = with_routes_decided(config, shape)
    check_tokenizer(Path(config.model.path), shape.vocab_size)
    check_packages([*servers_need(config), *(() if hosts_trtllm else MEGATRON)])
    return ServerJob(config, shape)


def _decided(config: Config, world: World, hosts_trtllm: bool) -> Config:
    machine = world.machine
    assert machine is not None, "a server is on this machine"
    if hosts_trtllm:  # needs nothing of what Megatron would
        return with_machine_defaults(config, on_gpu=machine.gpu is not None)
    return decide(config, machine)
