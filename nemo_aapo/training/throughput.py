"""How much of what the hardware can do a step reached: FLOPs by the planner's arithmetic over measured seconds."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping, Sequence

from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import compute, hardware, models
from nemo_aapo.planning.inputs import Inputs, Question, plan_inputs
from nemo_aapo.run.step_metrics import GroupNumbers, GroupTokens

PASSES_OF_TRAINING = 3
"""A backward pass takes twice the FLOPs of a forward pass; what is recomputed is no work that the model asks for."""


Counts = tuple[float, float, float]
"""Tokens that pass the layers, pairs of tokens that attention sees, tokens that pass the output layer."""


class Throughput:
    """Turns a step's groups and seconds into metrics of speed."""

    def __init__(self, config: Config, learns_without_advantage: bool) -> None:
        """
        Args:
            config: the run's, decided for this machine.
            learns_without_advantage: ``Objective``'s: groups without a signal are trained on, too.
        """
        gpu = hardware_here()
        self.config, self._peak = config, gpu.peak if gpu else None
        self._learns_without_advantage = learns_without_advantage
        self._ranks = config.trainer.num_nodes * config.trainer.devices
        self._inputs: Inputs | None = None
        with contextlib.suppress(ConfigError):  # a model that trains, but that the planner has no arithmetic for
            question = Question(models.read(config.model.path), gpu or hardware.KNOWN["h100"], 0.0, 0.0, None)
            self._inputs = plan_inputs(config, question)

    def metrics(
        self, generated: Sequence[GroupTokens], trained: Sequence[GroupNumbers], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics of a step.

        Args:
            generated: all groups that were generated for it, of all ranks.
            trained: those of them that the learner got.
            seconds: of the phases ``train`` and ``step``.

        Returns:
            ``tokens_per_second`` and ``tokens_per_second_per_rank``, of what was generated; ``memory/peak_gib`` of this
            rank, a GPU's or, without one, the process's; where the planner knows the model, ``tflops/train`` and
            ``tflops/step``, TFLOP/s of a rank in training and over the whole step, rollouts in these processes
            included; and where it knows the GPU, ``mfu``, the latter over the peak of the dtype that is computed in.
        """
        tokens = sum(sum(lengths) for _, lengths in generated)
        found = {
            "tokens_per_second": tokens / seconds["step"],
            "tokens_per_second_per_rank": tokens / seconds["step"] / self._ranks,
            "memory/peak_gib": peak_bytes() / 2**30,
        }
        if self._inputs is None:
            return found
        train = train_flops(self.config, self._inputs, trained, self._learns_without_advantage)
        rollout = 0.0 if self.config.rollout.engine == "remote" else rollout_flops(self._inputs, generated)
        found["tflops/train"] = train / seconds["train"] / self._ranks / 1e12
        found["tflops/step"] = (train + rollout) / seconds["step"] / self._ranks / 1e12
        if self._peak is not None:
            found["mfu"] = found["tflops/step"] * 1e12 / getattr(self._peak, self._inputs.learner.numbers)
        return found


def train_flops(
    config: Config, inputs: Inputs, groups: Sequence[GroupNumbers], learns_without_advantage: bool
) -> float:
    """FLOPs of a step's training passes and of the scoring before them, as the learner makes them.

    Groups without a signal are left out where it leaves them out, and a prompt that completions share passes the layers
    once; attention sees whole sequences all the same. Weights below adapters have no gradients: one pass less.
    """
    training = PASSES_OF_TRAINING - (config.model.lora is not None)
    passes = training * inputs.work.updates + inputs.work.scoring_passes
    return passes * _forward(inputs, [_trained(g, config, learns_without_advantage) for g in groups])


def rollout_flops(inputs: Inputs, groups: Sequence[GroupTokens]) -> float:
    """FLOPs of generating the groups: each prompt once, then every token of each completion."""
    return _forward(inputs, [_generated(*group) for group in groups])


def _forward(inputs: Inputs, counts: Sequence[Counts]) -> float:
    return compute.forward(inputs, *(sum(column) for column in zip(*counts, strict=True))).total


def _trained(group: GroupNumbers, config: Config, learns_without_advantage: bool) -> Counts:
    lengths = [int(n) for n, a in zip(group.lengths, group.advantages, strict=True) if n and not math.isnan(a)]
    learned = any(a != 0 and not math.isnan(a) for a in group.advantages)
    if not lengths or not (learned or learns_without_advantage):
        return 0.0, 0.0, 0.0
    prompts = group.prompt_tokens * (1 if config.model.share_prompts else len(lengths))
    pairs = sum((group.prompt_tokens + length) ** 2 / 2 for length in lengths)
    return prompts + sum(lengths), pairs, sum(lengths)


def _generated(prompt: int, lengths: Sequence[int]) -> Counts:
    pairs = prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in lengths)
    return prompt + sum(lengths), pairs, sum(lengths)


def hardware_here() -> hardware.Hardware | None:
    """The GPU of this rank, if it is one that the planner knows; the PCIe and NVL parts are slower than those."""
    import torch

    name = torch.cuda.get_device_name().upper() if torch.cuda.is_available() else ""
    if "PCIE" in name or "NVL" in name:
        return None
    return next((known for key, known in hardware.KNOWN.items() if key.upper() in name.split()), None)


def peak_bytes() -> int:
    """The most memory that this process has had so far: of its GPU as torch allocated it, else of the host."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
