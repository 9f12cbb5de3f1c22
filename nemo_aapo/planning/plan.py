"""A whole plan: what ``scripts/plan.py`` shows."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aapo.config import Config
from nemo_aapo.planning import compute, layouts, memory
from nemo_aapo.planning.compute import Phase, StoreSaving
from nemo_aapo.planning.inputs import Inputs, Question
from nemo_aapo.planning.layouts import Verdict
from nemo_aapo.planning.memory import RankMemory


@dataclass(frozen=True)
class Plan:
    """The answer."""

    inputs: Inputs
    memory: RankMemory
    step: tuple[Phase, ...]
    measured_step: tuple[Phase, ...] | None
    """The same at rates that were measured on this GPU, where there are any."""
    saving: StoreSaving
    straggler_seconds: float
    layouts: list[Verdict]
    smallest: Verdict | None
    """Only sought where no layout of the configured GPUs fits."""


def make(config: Config, question: Question) -> Plan:
    """Plan a configuration for a model on a GPU.

    Raises:
        ConfigError: the configured layout can't be for this model.
    """
    inputs = layouts.inputs_if_possible(config, question)
    rates, measured = question.hardware.peak, question.hardware.measured
    judged = layouts.judge_all(config, question)
    return Plan(
        inputs=inputs,
        memory=memory.of_rank(inputs),
        step=compute.step(inputs, rates),
        measured_step=compute.step(inputs, measured) if measured else None,
        saving=compute.store_saving(inputs, rates),
        straggler_seconds=compute.straggler_seconds(inputs, rates, config.rollout.max_new_tokens),
        layouts=judged,
        smallest=None if judged[0].fits else layouts.smallest(config, question),
    )
