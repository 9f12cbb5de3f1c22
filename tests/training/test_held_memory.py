"""Whoever only generates, judges or compares holds the weights and nothing of an optimization: bytes, counted."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.evaluation.test_evaluation_ranks import evaluate
from tests.evaluation.test_evaluation_ranks import folder as evaluation_folder  # noqa: F401
from tests.evaluation.test_evaluation_ranks import words as evaluation_words
from tests.training_runs import run, settings

MORE_THAN_WEIGHTS = 0.05
"""What else a model holds, as a share of its weights: the angles of its rotary embedding, micro-batches."""


def tensors_by_storage() -> dict[int, int]:
    """Bytes of every storage that a live tensor of this process looks at, by address; gradients included."""
    import torch

    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.device.type == "cpu"]
    tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def held_while_generating(job, *arguments):
    """Bytes that a job holds at its first and its last call of the engine, over those of its weights; how many layers
    have a gradient buffer; and how many of mcore's wrappers and optimizers there are."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    from nemo_aapo.engines.megatron.engine import MegatronEngine

    def wrappers():
        return {id(o) for o in gc.get_objects() if isinstance(o, DistributedDataParallel | MegatronOptimizer)}

    before, old = set(tensors_by_storage()), wrappers()
    found, generate = [], MegatronEngine.generate

    def counted(engine, *more):
        parameters = list(engine.model.parameters())
        weights = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in parameters}.values())
        held = sum(size for at, size in tensors_by_storage().items() if at not in before)
        found.append((held / weights, sum(hasattr(p, "main_grad") for p in parameters), len(wrappers() - old)))
        return generate(engine, *more)

    MegatronEngine.generate = counted
    try:
        job(*arguments)
    finally:
        MegatronEngine.generate = generate
    return found[0], found[-1]


def fill(overrides):
    from nemo_aapo import load_config
    from nemo_aapo.jobs import fill_reference
    from nemo_aapo.prepare.job import resolve

    assert fill_reference.fill(resolve(load_config(overrides), 1)) == 0


def check_parity(overrides):
    from nemo_aapo import load_config
    from nemo_aapo.doctor.checks import parity

    assert parity.measure(load_config(overrides))["tokens"] > 0


def serve(overrides):
    """The engine of a rollout server, and what its thread asks of it: completions, a refit, completions."""
    import numpy as np

    from nemo_aapo import load_config
    from nemo_aapo.engines.build import build_hosted_engine
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.mcore.groups import destroy_model_parallel
    from nemo_aapo.models.directory import read_model_dir
    from nemo_aapo.types import SamplingSpec

    config = decide(load_config(overrides), Machine.present())
    hosted = build_hosted_engine(config, read_model_dir(config.model.path))
    for version in (0, 1):
        hosted.engine.generate([np.array([5, 6], np.int32)], SamplingSpec(1.0, 4, (1,)), [[1, 2]])
        hosted.load(Path(config.model.path), version + 1)
    destroy_model_parallel()


INTEGER = ["rewards=[{name: integer, weight: 1.0}]", "validation.reward=integer", "reward_runner.workers=0"]


@pytest.mark.parametrize("job", [fill, check_parity, serve, evaluate])
def test_it_holds_its_weights_alone(ranks, evaluation_folder, job):  # noqa: F811
    folder = evaluation_folder
    words = settings(folder, folder / f"held_{job.__name__}", *INTEGER)
    if job is evaluate:
        words = evaluation_words(folder, "held_evaluate")
    for held, buffers, wrappers in ranks.run(held_while_generating, job, words, tp=None)[0]:
        assert held < 1 + MORE_THAN_WEIGHTS, held
        assert (buffers, wrappers) == (0, 0)


def test_a_training_run_holds_gradients_and_moments_as_well(ranks, evaluation_folder):  # noqa: F811
    """The same count finds them where they are: fp32 gradients as large as the weights, two moments after an update."""
    folder = evaluation_folder
    words = settings(
        folder, folder / "held_train", "trainer.max_steps=2", "algorithm=gpg", "trainer.val_check_interval=0"
    )
    first, last = ranks.run(held_while_generating, run, words, tp=None)[0]
    assert 2.0 < first[0] < 2.0 + MORE_THAN_WEIGHTS
    assert 4.0 < last[0] < 4.0 + MORE_THAN_WEIGHTS
    assert first[1] > 0
    assert first[2] > 0
