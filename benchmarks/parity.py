"""How far engine and learner are apart in bf16, by the parity gate's own figures: with FP8, and with LoRA adapters.

The in-process engine samples completions and the learner scores them, as in a run. FP8 is emulated (``fp8.py``). Merged
adapters are what ``MegatronPolicy.named_weights`` gives rollout servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks import generate
from benchmarks.fp8 import PROJECTIONS, RECIPES, Fp8Products

if TYPE_CHECKING:
    from nemo_aapo.learner.learner import Learner
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.types import Group

SAMPLES = 2
"""Completions of each prompt."""
ALL_TOKENS = 1 << 18
"""More than there are: the learner takes them in one pass, and the engine decodes all completions at a time."""
PAIRS = (("bf16", "bf16"), *((name, "bf16") for name in RECIPES), *((name, name) for name in RECIPES))
"""Precisions of learner and engine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of both comparisons."""

    layers: int = 4
    prompts: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 128
    fp8_hidden_size: int = 256
    weight_factors: tuple[float, ...] = (1.0, 2.0)
    """What the matrices are multiplied by once they are drawn."""
    lora_hidden_size: int = 128
    update_stds: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Standard deviations of what an adapter adds to its weight."""


QUICK = Plan(
    layers=2, prompts=4, prompt_tokens=16, new_tokens=16, fp8_hidden_size=64, weight_factors=(1.0,), update_stds=(1e-3,)
)


@dataclass(frozen=True, slots=True)
class Parity:
    """What the parity gate compares with its limits."""

    mult_prob_error: float
    gen_kl: float


@dataclass(frozen=True, slots=True)
class Fp8Row:
    """One line of the table of FP8."""

    weight_factor: float
    learner: str
    engine: str
    parity: Parity
    falls_by: float
    """The part of the same learner's mean |difference| to an engine in bf16 that this engine does away with."""


@dataclass(frozen=True, slots=True)
class LoraRow:
    """One line of the table of adapters; ``kept`` is the part of an update that is left in a weight."""

    update_std: float
    kept: float
    """... merged by Megatron-Bridge, as servers get it."""
    kept_in_fp32: float
    """... merged in float32 and rounded to bf16 once."""
    effect: float
    """Mean |difference| of the learner's log-probs with adapters and without."""
    apart: Parity
    """Of an engine that applies adapters apart: the in-process one."""
    merged: Parity
    """Of one with merged weights."""


def sample(policy: MegatronPolicy, prompts: int = 8, prompt_tokens: int = 128, new_tokens: int = 128) -> list[Group]:
    """``SAMPLES`` completions of each of some random prompts, by the in-process engine."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.types import Group, Prompt, SamplingSpec

    vocabulary = policy.shape.vocab_size
    engine = MegatronEngine(policy.module, vocabulary, ALL_TOKENS, speculation=False)
    ids = np.random.default_rng(1).integers(2, vocabulary, (prompts, prompt_tokens)).astype(np.int32)
    spec = SamplingSpec(temperature=1.0, max_new_tokens=new_tokens, stop_token_ids=())
    seeds = np.arange(prompts * SAMPLES).reshape(SAMPLES, prompts).T.tolist()
    completions = engine.generate(list(ids), spec, seeds)
    engine.close()
    nothing = np.zeros(SAMPLES)
    return [
        Group(Prompt("", prompt, "", "", ""), tuple(row), (), nothing, {}, nothing.astype(bool))
        for prompt, row in zip(ids, completions, strict=True)
    ]


def learner_of(policy: MegatronPolicy, max_tokens_per_microbatch: int) -> Learner:
    """What scores completions: packed or padded as the policy's configuration says, each with its own prompt."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.config import pad_multiple
    from nemo_aapo.learner.learner import Learner

    config = policy.config
    objective = Objective.of(config.algorithm, config.rollout.max_new_tokens)
    packed = bool(config.model.sequence_packing)
    return Learner(policy, objective, max_tokens_per_microbatch, 1, pad_multiple(config), packed)


def _policy(plan: Plan, hidden_size: int, folder: Path, *more: str) -> MegatronPolicy:
    """A random model in bf16, which runs refuse on a CPU. more: settings."""
    from nemo_aapo.config import with_machine_defaults
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.models.directory import read_model_dir

    path = folder / f"d{hidden_size}"
    if not path.exists():
        generate.random_model(generate.Plan(layers=plan.layers), hidden_size, path)
    config = with_machine_defaults(generate.config_of(path, "precision=bf16", *more), on_gpu=False)
    policy = MegatronPolicy(config, read_model_dir(str(path)))
    policy.module.bfloat16()  # a CPU's norms are made in float32
    return policy


def _compare(learner: Learner, groups: list[Group]) -> Parity:
    return Parity(**{name.removeprefix("parity/"): figure for name, figure in learner.parity(groups).items()})


def fp8(plan: Plan, folder: Path) -> list[Fp8Row]:
    """Learner and engine in FP8 and in bf16. folder: gets the model's files."""
    policy = _policy(plan, plan.fp8_hidden_size, folder)
    learner = learner_of(policy, ALL_TOKENS)
    drawn = {name: weight.detach().clone() for name, weight in policy.module.named_parameters() if weight.dim() == 2}
    rows: list[Fp8Row] = []
    for factor in plan.weight_factors:
        for name, weight in drawn.items():
            policy.module.get_parameter(name).data.copy_(factor * weight)
        products: dict[str, AbstractContextManager] = {name: Fp8Products(policy.module, name) for name in RECIPES}
        products["bf16"] = nullcontext()
        sampled: dict[str, list[Group]] = {}
        for engine, context in products.items():
            with context:
                sampled[engine] = sample(policy, plan.prompts, plan.prompt_tokens, plan.new_tokens)
        found: dict[tuple[str, str], Parity] = {}
        for pair in PAIRS:
            with products[pair[0]]:
                found[pair] = _compare(learner, sampled[pair[1]])
            difference, before = (np.log(found[p].mult_prob_error) for p in (pair, (pair[0], "bf16")))
            rows.append(Fp8Row(factor, *pair, found[pair], 1 - float(difference / before)))
    return rows


def lora(plan: Plan, folder: Path) -> list[LoraRow]:
    """Adapters apart and merged, for updates of some sizes. folder: gets the model's files."""
    adapters = f"model.lora={{rank: 16, alpha: 16, target_modules: [{', '.join(PROJECTIONS)}]}}"
    policy, base, server = (_policy(plan, plan.lora_hidden_size, folder, *more) for more in ((adapters,), (), ()))
    learner, without = (learner_of(each, ALL_TOKENS) for each in (policy, base))
    rows = []
    for std in plan.update_stds:
        updates = _adapt(policy, std)
        server.weight_map.load(server.module, dict(policy.named_weights()))  # as a refit does
        apart, merged = (sample(each, plan.prompts, plan.prompt_tokens, plan.new_tokens) for each in (policy, server))
        update = _joined(updates.values())
        before, after = (
            _joined(each.module.get_parameter(f"{name}.weight") for name in updates) for each in (base, server)
        )
        once = (before + update).bfloat16().double()
        kept, kept_in_fp32 = (float((weight - before) @ update / (update @ update)) for weight in (after, once))
        effect = float(np.abs(_logprobs(learner, apart) - _logprobs(without, apart)).mean())
        rows.append(LoraRow(std, kept, kept_in_fp32, effect, _compare(learner, apart), _compare(learner, merged)))
    return rows


@torch.no_grad()
def _adapt(policy: MegatronPolicy, std: float) -> dict[str, Tensor]:
    """Draw each adapter's B so that what is added to the weight has this std. Returns: layer -> that, in float32."""
    from nemo_aapo.mcore.bridge.lora import adapter_weights, is_adapted

    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, linear in policy.module.named_modules():
        if is_adapted(linear):
            a, b, scale = adapter_weights(linear)
            b.copy_(torch.randn(b.shape, generator=generator))
            b.mul_(std / (scale * b.float() @ a.float()).std())
            updates[name] = scale * b.float() @ a.float()
    return updates


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers one after the other, float64."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


def _logprobs(learner: Learner, groups: Sequence[Group]) -> np.ndarray:
    """The learner's log-probs of all tokens of all completions, one after the other."""
    figures = learner.token_figures(groups, range(0, len(groups) * SAMPLES, SAMPLES))
    return np.concatenate([figures[number][0] for number in sorted(figures)])


def fp8_table(rows: Sequence[Fp8Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["weights", "learner", "engine", "mult_prob_error", "gen_kl", "difference falls by"]
    return header, [
        [
            "as drawn" if row.weight_factor == 1 else f"times {row.weight_factor:g}",
            row.learner,
            row.engine,
            *_cells(row.parity),
            f"{row.falls_by:.0%}" if row.engine != "bf16" else "",
        ]
        for row in rows
    ]


def lora_table(rows: Sequence[LoraRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["update's std", "kept, merged", "kept, merged in fp32", "effect on log-probs"]
    header += [f"{how}: {figure}" for how in ("apart", "merged") for figure in ("mult_prob_error", "gen_kl")]
    return header, [
        [
            f"{row.update_std:.0e}",
            f"{row.kept:.3f}",
            f"{row.kept_in_fp32:.3f}",
            f"{row.effect:.1e}",
            *_cells(row.apart),
            *_cells(row.merged),
        ]
        for row in rows
    ]


def _cells(parity: Parity) -> list[str]:
    return [f"{parity.mult_prob_error:.5f}", f"{parity.gen_kl:.1e}"]
