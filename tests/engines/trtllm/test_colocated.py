"""One TensorRT-LLM engine (the stand-in) for two learner ranks: fed by Megatron-Bridge's export, heard by both."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from nemo_aapo.errors import RunError
from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS
from tests.tiny_models import make_config


def to_host(tensor, *_, original=torch.Tensor.cpu):
    """``Tensor.cpu`` of anything but weights: collectives of objects take their bytes by it."""
    assert not tensor.is_floating_point(), "a refit in the learner's GPUs took weights through host memory"
    return original(tensor)


def _rollout(path, tp, pp):
    """What this rank saw: weights in the engine's workers, completions, how they came, how a failure ended."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.build import build_engine
    from nemo_aapo.engines.ipc import memory
    from nemo_aapo.engines.trtllm import placement as trtllm_placement
    from nemo_aapo.engines.trtllm import settings as trtllm_settings
    from tests import cuda_ipc, fake_trtllm
    from tests.policies import make_policy

    layout = {"model__tensor_model_parallel_size": tp, "model__pipeline_model_parallel_size": pp, "trainer__devices": 2}
    policy = make_policy(make_config(path, **layout))
    config = make_config(
        path,
        **layout,
        precision__name="bf16",
        rollout__engine="trtllm",
        rollout__max_new_tokens=SAMPLING.max_new_tokens,
        rollout__trtllm__refit_bucket_bytes=50_000,
    )
    rank, came = parallel.rank(), []
    gpu = trtllm_placement.Gpu("node", rank, f"GPU-{rank}", 0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
        monkeypatch.setattr(trtllm_settings, "_has_gpu", lambda: True)
        monkeypatch.setattr(trtllm_settings, "ray_difference", str)
        monkeypatch.setattr(trtllm_placement, "visible_gpu", lambda: gpu)
        fake = fake_trtllm.install(monkeypatch)
        fake.device_ids = ["GPU-0", "GPU-1"]
        engine = build_engine(config, types.SimpleNamespace(version=0, moments_to_come=lambda: 0), None, str)
        with pytest.MonkeyPatch.context() as inside:  # where weights lie they are handed over
            inside.setattr(torch.Tensor, "cpu", to_host)
            engine.update_weights(policy.named_weights(), 5)
        engine.wake()
        out = engine.generate(PROMPTS, SAMPLING, SEEDS, lambda i, j, completion: came.append((i, j)))
        workers = [worker.engine.weights for started in fake.engines for worker in started.workers]
        served = [{name: tensor.numpy() for name, tensor in weights.items()} for weights in workers]
        engine.sleep()
        engine.wake()
        fake.fail_request = fake.requests + 3
        try:
            engine.generate(PROMPTS, SAMPLING, SEEDS)
        except RunError as error:
            failure = str(error)
        engine.close()
    drawn = [[(c.token_ids.tolist(), c.logprobs.tolist(), c.policy_version) for c in row] for row in out]
    exported = {name: tensor.numpy() for name, tensor in policy.named_weights()}
    return served, exported, fake.bucket_bytes, drawn, came, engine.stats.tokens, failure


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_all_ranks_feed_the_engine_and_hear_the_same_completions_and_the_same_failure(ranks, tiny_models, tp, pp):
    owner, other = ranks.run(_rollout, tiny_models["qwen2"], tp, pp, world=2, tp=tp, pp=pp)
    served, exported, bucket_bytes = owner[:3]
    assert len(served) == 2  # one worker on each rank's GPU
    for weights in served:
        assert weights.keys() - {"model.table.weight"} == exported.keys()
        assert all(np.array_equal(weights[name], exported[name]) for name in exported)
    largest = max(tensor.nbytes for tensor in exported.values())
    assert len(bucket_bytes) > 2 * 2
    assert max(bucket_bytes) <= max(50_000, largest)
    assert other[0] == []  # the other rank started nothing
    assert other[3:] == owner[3:]
    assert owner[3][0][0][2] == 5
    assert "CUDA error" in owner[6]
