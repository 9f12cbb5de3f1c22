"""The layouts of a number of GPUs, and which of them fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_aapo.config import Config, derive
from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import compute, memory
from nemo_aapo.planning.inputs import Inputs, Layout, Question, layout_of, plan_inputs

MOST_GPUS = 1024
"""``smallest`` looks no further than this."""


@dataclass(frozen=True)
class Verdict:
    """One layout, judged: refused, too large, or fitting."""

    layout: Layout
    refused: str | None
    """The reason why the configuration does not allow it; None: it does."""
    bytes: float = 0.0
    """Peak memory of the fullest rank."""
    fits: bool = False
    """The peak is within the GPU's memory."""
    seconds: float = 0.0
    """Lower bound of the time of a step."""


def with_layout(config: Config, layout: Layout) -> Config:
    """The configuration with another layout."""
    model = dataclasses.replace(
        config.model,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=layout.sequence_parallel,
    )
    return dataclasses.replace(config, model=model)


def with_gpus(config: Config, gpus: int) -> Config:
    """The configuration on another number of GPUs, on nodes of the same size."""
    node = min(gpus, max(8, config.trainer.devices))
    return dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, num_nodes=gpus // node, devices=node)
    )


def candidates(config: Config, experts: int) -> list[Layout]:
    """Every TP x PP x CP x DP of the configured GPUs and EP of their experts, if any.

    TP lies within a node, and is sequence parallel where it is more than 1.
    """
    ranks, node = config.trainer.num_nodes * config.trainer.devices, config.trainer.devices
    found = []
    for tensor in (size for size in _divisors(ranks) if node % size == 0):
        for pipeline in _divisors(ranks // tensor):
            for context in _divisors(ranks // tensor // pipeline):
                data = ranks // tensor // pipeline // context
                for expert in _divisors(tensor * context * data) if experts else [1]:
                    found.append(Layout(tensor, pipeline, data, tensor > 1, node, context, expert))
    return found


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def refusal(config: Config, question: Question) -> str | None:
    """The reason why the configured layout is impossible for this model; None: it is possible."""
    ranks = config.trainer.num_nodes * config.trainer.devices
    try:
        derive(config, question.model.shape(), ranks)
    except ConfigError as error:
        return str(error)
    tensor = config.model.tensor_model_parallel_size
    if question.model.vocabulary % tensor:
        return f"tensor-parallel size {tensor} does not divide the vocabulary of {question.model.vocabulary} entries"
    return None


def judge(config: Config, question: Question) -> Verdict:
    """Judge the configured layout."""
    reason = refusal(config, question)
    if reason is not None:
        return Verdict(layout_of(config), reason)
    inputs = plan_inputs(config, question)
    needed = memory.rank_memory(inputs)
    seconds = compute.seconds_of(compute.step(inputs, question.hardware.peak))
    return Verdict(inputs.layout, None, needed.peak, needed.fits, seconds)


def judge_all(config: Config, question: Question) -> list[Verdict]:
    """Judge every layout of the configured GPUs. Fitting ones come first, among them that with the shortest step."""
    verdicts = [judge(with_layout(config, layout), question) for layout in candidates(config, question.model.experts)]
    return sorted(verdicts, key=lambda v: (v.refused is not None, not v.fits, v.seconds if v.fits else v.bytes))


def smallest(config: Config, question: Question) -> Verdict | None:
    """The layout that fits on the fewest GPUs of 1, 2, 4, ... ``MOST_GPUS``; None: none fits."""
    gpus = 1
    while gpus <= MOST_GPUS:
        best = judge_all(with_gpus(config, gpus), question)[0]
        if best.fits:
            return best
        gpus *= 2
    return None


def inputs_if_possible(config: Config, question: Question) -> Inputs:
    """The inputs of a plan, if the configured layout is possible.

    Raises:
        ConfigError: the configured layout is impossible for this model.
    """
    reason = refusal(config, question)
    if reason is not None:
        raise ConfigError(reason)
    return plan_inputs(config, question)
