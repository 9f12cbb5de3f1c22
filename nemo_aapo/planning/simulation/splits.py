"""The ways to divide N GPUs between trainer and rollout servers, each simulated with the same lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import compute, layouts, memory, parameters
from nemo_aapo.planning.hardware import RUNTIME_BYTES
from nemo_aapo.planning.inputs import Inputs, Layout, Question, plan_inputs
from nemo_aapo.planning.simulation.decoding import engine_of
from nemo_aapo.planning.simulation.lengths import Lengths
from nemo_aapo.planning.simulation.schedule import Outcome, Seconds, schedule

DEPTHS = (0, 1, 2, 4)
"""The values of ``rollout.async_depth`` that are compared."""
STEPS = 24
SHARES = 8
"""Servers get 1, 2, ... of so many parts of the GPUs."""
NODE = 8
REFITS = ("files", "delta", "collective")
FILE_BYTES_S = 2e9
"""Bytes that a shared file system gives one process in a second: an assumption, not a measurement."""
DELTA_FRACTION = 0.1
"""Bytes of a version's difference over those of the version, bf16 at lr 1e-6: an assumption as well."""


@dataclass(frozen=True)
class Split:
    """GPUs of both sides, and the run's speed by ``rollout.async_depth``."""

    layout: Layout
    """The trainer's; colocated, also that of the engines."""
    servers: int
    """Number of rollout servers; 0: colocated, the engines run in the trainer's GPUs."""
    server_gpus: int
    """GPUs of one server."""
    rows: int
    """Sequences that an engine runs at a time."""
    seconds: Seconds
    outcomes: dict[int, Outcome]
    """By ``async_depth``; colocated, of 0 alone."""


@dataclass(frozen=True)
class Refit:
    """One way to bring a version of the weights to the servers of a split."""

    kind: str
    send_s: float
    load_s: float
    outcomes: dict[int, Outcome]


@dataclass(frozen=True)
class Simulation:
    """A run on all splits of the GPUs."""

    gpus: int
    lengths: str
    mean_tokens: float
    """Mean of the lengths drawn, cut at the limit."""
    tail_factor: float
    """Longest of a step's completions over their mean, averaged over the steps."""
    truncated_fraction: float
    """Share of the completions that the limit cut."""
    steps: int
    splits: list[Split]
    """Those on which everything fits: colocated first, then by the servers' share."""
    refits: list[Refit]
    """The kinds of refit on the split with servers that is fastest; empty where none fits."""

    def best(self, depth: int) -> Split | None:
        """The split with the shortest step."""
        having = [split for split in self.splits if depth in split.outcomes]
        return min(having, key=lambda split: split.outcomes[depth].step_s, default=None)


def simulate(config: Config, question: Question, lengths: Lengths, gpus: int) -> Simulation:
    """Simulate a run on every split of so many GPUs.

    Args:
        lengths: of completions.

    Raises:
        ConfigError: nothing fits, or the engines would generate the reference's completions as well.
    """
    if config.algorithm.reference == "online":
        raise ConfigError("tail_factor, lengths: simulated are runs with stored reference rewards, and not with "
                          "algorithm.reference=online")  # fmt: skip
    prompts, count = config.prompts_per_step, config.prompts_per_step * config.group_size
    drawn = [lengths.draw(count, f"{config.seed}/{k}") for k in range(STEPS)]
    batches = [[row[i::prompts] for i in range(prompts)] for row in drawn]
    mean = sum(map(sum, drawn)) / STEPS / count
    question = dataclasses.replace(question, mean_completion_tokens=mean)
    colocated = _best_layout(_with_engine(config, "megatron"), question, gpus)
    splits = [_split(colocated, None, 0, "none", batches)] if colocated else []
    splits += _with_servers(_with_engine(config, "remote"), question, gpus, batches)
    if not splits:
        raise ConfigError(f"gpus={gpus}: neither side fits, however they are divided. More GPUs, or a smaller model")
    fastest = min((split for split in splits if split.servers), key=_fastest_s, default=None)
    return Simulation(
        gpus=gpus,
        lengths=str(lengths),
        mean_tokens=mean,
        tail_factor=sum(max(row) * count / sum(row) for row in drawn) / STEPS,
        truncated_fraction=sum(n >= config.rollout.max_new_tokens for row in drawn for n in row) / STEPS / count,
        steps=STEPS,
        splits=splits,
        refits=[_refitted(fastest, question, kind) for kind in REFITS] if fastest else [],
    )


def refit_seconds(question: Question, trainer_gpus: int, servers: int, each: int, kind: str) -> tuple[float, float]:
    """Seconds in which the trainer sends one version, and those in which a server takes it.

    ``files``: rank 0 writes the whole to a shared file system, and every server reads it. ``delta``: the same of the
    difference to the version before. ``collective``: all GPUs of both sides exchange their parts over the network.

    Args:
        each: GPUs of one server.
    """
    size, hardware = 2.0 * parameters.whole(question.model).total, question.hardware
    if kind == "collective":
        exchange_s = max(size / each, size * servers / trainer_gpus) / hardware.network
        return exchange_s, exchange_s
    way_s = size * (DELTA_FRACTION if kind == "delta" else 1.0) * (1 / FILE_BYTES_S + 1 / hardware.pcie)
    return way_s, way_s


# ---------------------------------------------------------------- one split


def _split(
    trainer: Inputs, server: Inputs | None, each: int, kind: str, batches: Sequence[Sequence[Sequence[int]]]
) -> Split:
    """Args:
    server: what the servers compute with; None: colocated, the trainer's GPUs generate.
    each: GPUs of one server.
    kind: of refit.
    batches: the lengths of each step's completions, by prompt; prompts go round the engines.
    """
    rates, side = trainer.hardware.peak, server or trainer
    engine, engines = engine_of(side, rates), side.engine.engines
    a_token = compute.train_phase(trainer, rates).seconds + compute.score_phase(trainer, rates).seconds
    a_token /= trainer.work.completions * trainer.work.completion_tokens
    seconds = Seconds(
        generate=[[engine.seconds(batch[number::engines]) for number in range(engines)] for batch in batches],
        train=[a_token * sum(map(sum, batch)) for batch in batches],
    )
    if server is not None:
        question = Question(trainer.model, trainer.hardware, 0.0, 0.0, None)
        send, load = refit_seconds(question, trainer.layout.ranks, engines, each, kind)
        seconds = dataclasses.replace(seconds, send=send, load=load)
    depths = (0,) if server is None else DEPTHS
    outcomes = {depth: schedule(seconds, depth) for depth in depths}
    return Split(trainer.layout, engines if server else 0, each, engine.rows, seconds, outcomes)


def _refitted(split: Split, question: Question, kind: str) -> Refit:
    """The same split with another kind of refit."""
    send, load = refit_seconds(question, split.layout.ranks, split.servers, split.server_gpus, kind)
    seconds = dataclasses.replace(split.seconds, send=send, load=load)
    return Refit(kind, send, load, {depth: schedule(seconds, depth) for depth in DEPTHS})


def _with_servers(
    config: Config, question: Question, gpus: int, batches: Sequence[Sequence[Sequence[int]]]
) -> list[Split]:
    """The splits with servers that fit, by the servers' share."""
    if config.rollout.refit == "ipc":  # servers on the trainer's own GPUs, as colocated engines
        return []
    sizes = _server_sizes(config, question)
    found = []
    for share in sorted({max(1, gpus * part // SHARES) for part in range(1, SHARES)}):
        if share < gpus and (trainer := _best_layout(config, question, gpus - share)) is not None:
            each_size = [
                _split(trainer, _server(trainer, share // each, each), each, config.rollout.refit, batches)
                for each in sizes
                if share % each == 0
            ]
            found += [min(each_size, key=_fastest_s)] if each_size else []
    return found


def _fastest_s(split: Split) -> float:
    return split.outcomes[DEPTHS[-1]].step_s


def _with_engine(config: Config, engine: Literal["megatron", "remote"]) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))


def _best_layout(config: Config, question: Question, gpus: int) -> Inputs | None:
    """The trainer's fitting layout with the shortest step; None: none fits."""
    node = max(size for size in range(1, min(gpus, NODE) + 1) if gpus % size == 0)
    on = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_nodes=gpus // node, devices=node))
    best = layouts.judge_all(on, question)[0]
    return plan_inputs(layouts.with_layout(on, best.layout), question) if best.fits else None


def _server(trainer: Inputs, servers: int, each: int) -> Inputs:
    """What the servers compute with: the in-process engine, in bfloat16, tensor parallel on GPUs of their own."""
    experts = each if trainer.model.experts else 1
    layout = Layout(tensor=each, data=servers, sequence_parallel=each > 1, expert=experts)
    learner = dataclasses.replace(trainer.learner, numbers="bf16")
    engine = dataclasses.replace(trainer.engine, kind="megatron", engines=servers, gpus=each)
    return dataclasses.replace(trainer, layout=layout, learner=learner, engine=engine)


def _server_sizes(config: Config, question: Question) -> list[int]:
    """GPUs that one server may have: those that hold its weights and KV cache."""
    model, found = question.model, []
    for each in (size for size in (1, 2, 4, NODE) if not model.heads % size and not model.groups % size):
        server = _server(plan_inputs(config, question), 1, each)
        weights = 2 * parameters.rank_parameters(model, server.layout, 0).total
        cache = config.rollout.max_concurrent_tokens * memory.kv_bytes_per_token(server, each, 1)
        other = RUNTIME_BYTES + memory.TRTLLM_WORKSPACE_BYTES
        if weights + cache + other <= question.hardware.memory_bytes:
            found.append(each)
    return found
