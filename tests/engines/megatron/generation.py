"""Prompts, sampling specs and models with which tests of the Megatron engine generate completions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from nemo_aapo.types import SamplingSpec
from tests.tiny_models import make_config

VOCAB_SIZE = 150  # of the model's 160: the rest plays Megatron's padding
SPEC = SamplingSpec(temperature=0.8, max_new_tokens=24, stop_token_ids=(3, 7, 20, 41, 90, 111), min_new_tokens=2)
GREEDY = dataclasses.replace(SPEC, temperature=0.0)
TIGHT, SNUG, ROOMY = 5 * 43, 12 * 43, 100 * 43
"""Budgets of 5 rows, of 12, and of one for each of the 25 sequences. With few rows more of them are refilled, but each
token of a row is a step, in which several ranks wait for one another again and again."""
LAYOUTS = {"2x1": (2, 1, False), "1x2": (1, 2, False), "2x2": (2, 2, False), "2x1+sp": (2, 1, True)}


def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, VOCAB_SIZE, n).astype(np.int32) for n in (3, 19, 1, 8, 8, 13)]


SEEDS = [[1000 * i + j for j in range(size)] for i, size in enumerate((6, 4, 7, 1, 0, 7))]


def build(path: Path, tp: int = 1, pp: int = 1, sp: bool = False):
    """This rank's stage, with the weights of a Hugging Face directory."""
    import torch

    from nemo_aapo.distributed import parallel
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.bridge.weights import WeightMap
    from nemo_aapo.mcore.model import build_stage

    weights = WeightMap(str(path), torch.float32)
    fields = {
        **precision.model_fields(decide(make_config(path), Machine.present())),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": parallel.expert_parallel_size(),
        "sequence_parallel": sp,
    }
    model = build_stage(weights, fields)
    weights.load(model)
    return model


def generate(path, calls, tp=1, pp=1, sp=False):
    """On each rank: for each call (prompts, seeds, spec, budget) the completions, the order they came in, the stats."""
    from nemo_aapo.engines.base import RolloutEngine
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model, results = build(path, tp, pp, sp), []
    for texts, seeds, spec, budget in calls:
        engine = MegatronEngine(model, VOCAB_SIZE, budget, policy_version=4)
        assert isinstance(engine, RolloutEngine)
        told: list[tuple] = []
        out = engine.generate(texts, spec, seeds, lambda *news, told=told: told.append(news))
        assert all(out[i][j] is completion for i, j, completion in told)
        order = [(i, j) for i, j, _ in told]
        assert sorted(order) == [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        results.append((out, order, engine.stats))
    return results


def one_rank(ranks, path, *calls):
    return ranks.run(generate, path, calls)[0]


def flat(completions) -> list[list[int]]:
    return [completion.token_ids.tolist() for row in completions for completion in row]
