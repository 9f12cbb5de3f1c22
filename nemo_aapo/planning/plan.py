"""The whole plan that ``scripts/plan.py`` shows."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aapo.config import Config
from nemo_aapo.planning import compute, layouts, memory
from nemo_aapo.planning.compute import Phase, StoreSaving
from nemo_aapo.planning.inputs import Inputs, Question
from nemo_aapo.planning.layouts import Verdict
from nemo_aapo.planning.memory import RankMemory, ServerMemory
from nemo_aapo.planning.simulation.splits import Simulation, simulate


@dataclass(frozen=True)
class Plan:
    """What a run would take: memory, time, and the layouts that fit."""

    inputs: Inputs
    memory: RankMemory
    server: ServerMemory | None
    """None: the run has no rollout servers."""
    step: tuple[Phase, ...]
    measured_step: tuple[Phase, ...] | None
    """The phases of a step at rates that were measured on this GPU; None: nobody measured them."""
    saving: StoreSaving
    straggler_seconds: float
    """Lower bound for one completion of the longest length that decodes alone."""
    layouts: list[Verdict]
    smallest: Verdict | None
    """The fitting layout on the fewest GPUs; None: not sought, as one on the configured GPUs fits, or none fits."""
    simulation: Simulation | None
    """The run with lengths that vary, on every split of the GPUs; None: not asked for."""

    @property
    def fits(self) -> bool:
        """Whether trainer and servers have the memory that they need."""
        return self.memory.fits and (self.server is None or self.server.rank.fits)


def make(config: Config, question: Question) -> Plan:
    """Plan a configuration for a model on a GPU.

    Raises:
        ConfigError: the configured layout is impossible for this model.
    """
    inputs = layouts.inputs_if_possible(config, question)
    rates, measured = question.hardware.peak, question.hardware.measured
    judged = layouts.judge_all(config, question)
    gpus = question.gpus or config.trainer.num_nodes * config.trainer.devices
    return Plan(
        inputs=inputs,
        memory=memory.rank_memory(inputs),
        server=memory.server_memory(inputs, config.rollout.server) if config.rollout.engine == "remote" else None,
        step=compute.step(inputs, rates),
        measured_step=compute.step(inputs, measured) if measured else None,
        saving=compute.store_saving(inputs, rates),
        straggler_seconds=compute.straggler_seconds(inputs, rates, config.rollout.max_new_tokens),
        layouts=judged,
        smallest=None if judged[0].fits else layouts.smallest(config, question),
        simulation=simulate(config, question, question.lengths, gpus) if question.lengths else None,
    )
