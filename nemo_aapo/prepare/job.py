"""What a command is to do, wholly resolved: nothing downstream decides or checks again. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.algorithms.base import Algorithm
from nemo_aapo.config import Config, ModelShape, Sizes, parse, with_routes_decided, without_secrets
from nemo_aapo.config.build import with_paths
from nemo_aapo.config.command_line import TRAINING, CommandLine, ConfigFile, read_command_line
from nemo_aapo.config.compose import compose, resolved
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch.world import Machine, World, check_place, decide, of_rank
from nemo_aapo.models.directory import CPU_ONLY, LOCAL_LAYERS_ONLY, check_model
from nemo_aapo.prepare.algorithm import with_algorithm
from nemo_aapo.prepare.files import check_data, check_replay
from nemo_aapo.prepare.loggers import check_loggers
from nemo_aapo.prepare.packages import check_packages, loggers_need, packages_of
from nemo_aapo.prepare.text import with_date
from nemo_aapo.reference_store.shards import Shard
from nemo_aapo.rewards import reward_of
from nemo_aapo.rewards.base import Reward
from nemo_aapo.run.directory import check_run_directory
from nemo_aapo.utils.files import require_directory, require_file

Words = Sequence[str] | CommandLine
"""``KEY=VALUE`` words as they were typed, or already split from a command's options."""
FillTask = Literal["fill", "merge", "status"]
"""What is done with a reference store: sample what it lacks, join what shards have sampled, or only look."""


@dataclass(frozen=True)
class Job:
    """A training run, or the part of one that fills the reference store.

    Example: ``prepare(["model.path=m", "data.train=t.jsonl", "data.validation=v.jsonl"])`` on a machine without a GPU
    has ``config.precision.name == "fp32"`` and ``sizes.data_parallel_size == 1``.
    """

    config: Config
    """No ``auto``, and no null that is left to the machine, unless the ``machine`` is not known."""
    tree: Mapping[str, Any]
    """The configuration as a plain tree without secrets: what ``config.yaml`` of the run directory shows."""
    shape: ModelShape
    """The shape of the model at ``config.model.path``."""
    sizes: Sizes
    """Data-parallel size, sequences a step and the like, with the arithmetic that led to them."""
    rewards: tuple[tuple[Reward, float], ...]
    """What judges a completion, each with its weight; empty where the caller brings a scorer of their own."""
    machine: Machine | None
    """Where the ranks run. None: a launcher does not know; each rank prepares the same tree again, and decides."""


def prepare(words: Words, world: Callable[[Config], World] = of_rank) -> Job:
    """The training run that words ask for, with every refusal that words and files allow.

    Args:
        world: the ranks that will run it, by the configuration (``launch.world``).

    Raises:
        ConfigError, DataError: what can't work, with the reason and the remedy. Nothing was written.
    """
    command = command_line(words)
    return _training(*settings_of(command), world, command.overrides)


def prepare_fill(
    words: Words, world: Callable[[Config], World], task: FillTask = "fill", shard: Shard | None = None
) -> Job:
    """The same for the filling of a run's reference store, whose run directory may hold anything.

    Args:
        task: only what it writes has to be writable.
        shard: fill this part alone, into a file of its own.

    Raises:
        ConfigError, DataError: as ``prepare``; or the algorithm stores no reference rewards.
    """
    command = command_line(words)
    config, tree = settings_of(command)
    config = with_algorithm(config)
    if config.algorithm.reference != "cached":
        mode = config.algorithm.reference or "null"
        raise ConfigError(f"algorithm.reference={mode}: only cached reference rewards are stored (algorithm=aapo)")
    job = _job(config, tree, world, typed=command.overrides if task == "fill" else ())
    if task == "fill":
        require_directory(Path(config.run.dir), f"run.dir={config.run.dir}")
        _check_store(job, shard)
    elif task == "merge":
        store = str(job.config.algorithm.reference_store)
        require_file(Path(store), f"algorithm.reference_store={store}")
    return job


def prepare_tree(tree: Any, world: Callable[[Config], World] = of_rank) -> Job:
    """As ``prepare``, from a tree that was composed elsewhere, by NeMo's ``hydra_runner`` for example.

    Args:
        tree: an OmegaConf tree or a plain mapping, whole as ``conf/train_aapo.yaml``.
    """
    plain = resolved(tree)
    return _training(parse(plain), without_secrets(plain), world)


def settings_of(words: Words) -> tuple[Config, dict[str, Any]]:
    """What words alone tell: the typed configuration, and its tree without secrets.

    Raises:
        ConfigError: a mistyped key or value, settings that can't go together, an unknown reward or parameter of one.
    """
    command = command_line(words)
    tree = compose(command)
    config = parse(tree)
    rewards_of(config)
    _check_trtllm_words(config, command)
    return config, without_secrets(tree)


def _check_trtllm_words(config: Config, command: CommandLine) -> None:
    """Refuse settings of TensorRT-LLM that were typed where there is none; a server reads them for itself."""
    rollout = config.rollout
    if rollout.engine == "trtllm" or (rollout.engine == "remote" and rollout.server.engine == "trtllm"):
        return
    for word in command.overrides:
        if word.startswith("rollout.trtllm."):
            engine, server = rollout.engine, rollout.server.engine
            hosted = f", rollout.server.engine={server}" if engine == "remote" else ""
            raise ConfigError(f"{word} has no effect with rollout.engine={engine}{hosted}: leave it out")


def command_line(words: Words, kind: ConfigFile = TRAINING) -> CommandLine:
    """The words split, unless a command has done so."""
    return words if isinstance(words, CommandLine) else read_command_line(list(words), kind)


def rewards_of(config: Config) -> tuple[tuple[Reward, float], ...]:
    """The rewards with their weights.

    Raises:
        ConfigError: an unknown name or parameter, the nearest named; ``validation.reward`` is none of them.
    """
    rewards = tuple(reward_of(entry) for entry in config.rewards)
    names = [reward.name for reward, _ in rewards]
    if config.validation.reward not in names:
        raise ConfigError(
            f"validation.reward={config.validation.reward!r} is none of rewards: {names}. Name one of them, or add it "
            "with the weight 0, which only reports it"
        )
    return rewards


def resolve(
    config: Config,
    world_size: int,
    tree: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
    algorithm: Algorithm | None = None,
) -> Job:
    """The job of a configuration of one's own, for ranks on this machine.

    Args:
        world_size: ranks that run it.
        tree: the configuration as it was composed; None: made from ``config``.
        given: parts that the caller brings, by their names in ``nemo_aapo.train``: ``rewards``, ``data``,
            ``validation_data``. What the configuration says of these is not looked at.
        algorithm: of the caller's own, in place of the one that the configuration names.

    Raises:
        ConfigError, DataError: what can't work, with the reason and the remedy.
    """
    world = World(world_size, Machine.present())
    config = with_algorithm(config, algorithm)
    return _job(config, without_secrets(_plain(config)) if tree is None else tree, lambda config: world, given)


def _training(
    config: Config, tree: Mapping[str, Any], world: Callable[[Config], World], typed: Sequence[str] = ()
) -> Job:
    """What logs and writes a run directory."""
    job = _job(config, tree, world, typed=typed)
    check_run_directory(job.config)
    _check_store(job)
    check_replay(job.config)
    check_loggers(job.config, here=job.machine is not None)
    return job


def _check_store(job: Job, shard: Shard | None = None) -> None:
    """Refuse a reference store that can't be made. One that is there may be read-only: perhaps it lacks nothing.

    A launcher may see other disks than the ranks do.
    """
    store = job.config.algorithm.reference_store
    if store is None or job.machine is None:
        return
    file = shard.path(store) if shard else Path(store)
    if not file.is_file():
        require_file(file, f"algorithm.reference_store={store}")


def _job(
    config: Config,
    tree: Mapping[str, Any],
    world_of: Callable[[Config], World],
    given: Collection[str] = (),
    typed: Sequence[str] = (),
) -> Job:
    world = world_of(config)
    if world.machine is not None:
        check_place(config, typed)
    if config.rollout.refit != "files" and config.rollout.engine != "remote":
        raise ConfigError(
            f"rollout.refit={config.rollout.refit} has no effect with rollout.engine={config.rollout.engine}: it is "
            "how rollout servers (rollout.engine=remote) get new weights. Leave it out"
        )
    rewards = () if "rewards" in given else rewards_of(config)
    elsewhere = world.machine is None and not _runs_this_python(config)
    config = config if elsewhere and config.algorithm.custom else with_algorithm(config)
    if world.machine is not None:
        if config.rollout.engine == "trtllm":
            trtllm_settings.check(config)
        if config.rollout.engine == "remote" and config.rollout.refit == "ipc" and world.machine.gpu is not None:
            trtllm_settings.check_allocator()
        config = decide(config, world.machine)
    shape, sizes = check_model(config, world.size)
    if world.machine is not None and world.machine.gpu and shape.architecture in LOCAL_LAYERS_ONLY:
        raise ConfigError(f"model.path={config.model.path}: {CPU_ONLY}")
    config = with_routes_decided(config, shape)
    config = with_date(config, shape.vocab_size)
    check_data(config.data, given)
    if world.machine is not None:
        check_packages(packages_of(config, given))
    elif not elsewhere:
        check_packages(loggers_need(config))
    return Job(config, _with_decisions(tree, config), shape, sizes, rewards, world.machine)


def _runs_this_python(config: Config) -> bool:
    """Whether a job that a launcher submits finds the packages that are here."""
    return config.cluster.python is None and config.cluster.container.image is None


def _with_decisions(tree: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The tree with the paths, and what was left to the machine or to the day of the first start."""
    tree, decided = with_paths(tree, config), _plain(config)
    data = {**tree["data"], "date": config.data.date}
    rollout = {**tree["rollout"], "replay_routes": config.rollout.replay_routes}
    algorithm = tree["algorithm"] if config.algorithm.custom is None else decided["algorithm"]
    return {
        **tree,
        "algorithm": algorithm,
        "precision": decided["precision"],
        "model": decided["model"],
        "data": data,
        "rollout": rollout,
    }


def _plain(config: Config) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
