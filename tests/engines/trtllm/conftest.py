"""What the tests of the TensorRT-LLM engine share: engines on the stand-in for the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.trtllm import placement as trtllm_placement
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.engines.trtllm.engine import TrtllmEngine
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.engines.trtllm.settings import TrtllmSettings
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import SamplingSpec
from tests import cuda_ipc, fake_trtllm

SETTINGS = TrtllmSettings(
    model_path="/model",
    dtype="bfloat16",
    tensor_parallel_size=1,
    max_prompt_tokens=2000,
    max_new_tokens=40,
    max_concurrent_tokens=4096,
    kv_cache_fraction=0.4,
    refit_bucket_bytes=1 << 20,
    timeout_s=20.0,
)
STOP = 3
SAMPLING = SamplingSpec(1.0, max_new_tokens=40, stop_token_ids=(STOP,))
PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([5, 6], [7], list(range(9, 20)))]
SEEDS = [[stream_seed(i, j) for j in range(4)] for i in range(len(PROMPTS))]


@pytest.fixture
def fake(monkeypatch):
    """The stand-in is ``tensorrt_llm``, for this test."""
    monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
    return fake_trtllm.install(monkeypatch)


def pretend_gpus(monkeypatch, count=1):
    """A machine with GPUs and the Ray that the library wants, as far as the adapter looks."""
    monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
    monkeypatch.setattr(trtllm_settings, "_has_gpu", lambda: True)
    monkeypatch.setattr(trtllm_settings, "ray_difference", str)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(trtllm_placement, "visible_gpu", lambda device: Gpu("node", device, f"GPU-{device}", device))


def start(colocated=True, **settings) -> TrtllmEngine:
    return TrtllmEngine(
        TrtllmSettings(**{**vars(SETTINGS), **settings}),
        trtllm_placement.Alone(),
        [Gpu("node", 5, "GPU-0", 0)],
        colocated=colocated,
    )


@pytest.fixture
def engine(fake):
    engine = start()
    yield engine
    engine.close()


def tokens(completions):
    return [[completion.token_ids.tolist() for completion in row] for row in completions]
