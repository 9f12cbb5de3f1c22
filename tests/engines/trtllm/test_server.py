"""A rollout server that hosts the TensorRT-LLM engine, on the stand-in for the library: requests, refit, log-probs."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from aiohttp import web
from safetensors.torch import save_file

from nemo_aapo.config import ModelShape
from nemo_aapo.engines.build import build_hosted_engine
from nemo_aapo.engines.deltas import VersionReader
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish
from nemo_aapo.engines.remote.dispatch import Call, Fleet
from nemo_aapo.engines.remote.service import Service
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.worker import EngineWorker
from nemo_aapo.engines.trtllm import placement as trtllm_placement
from nemo_aapo.engines.trtllm import refit as trtllm_refit
from nemo_aapo.engines.trtllm import settings as trtllm_settings
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.types import SamplingSpec
from tests import fake_trtllm
from tests.engines.trtllm.conftest import PROMPTS, SEEDS, STOP, export_on_cpu
from tests.fake_trtllm import TABLE, VOCAB, table
from tests.tiny_models import make_config

SAMPLING = SamplingSpec(1.0, 16, (STOP,))


@pytest.fixture
def config(monkeypatch, tmp_path):
    fake_trtllm.install(monkeypatch)
    monkeypatch.setattr(trtllm_refit, "export_to_ipc", export_on_cpu)
    monkeypatch.setattr(trtllm_settings, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(trtllm_placement, "visible_gpu", lambda device: Gpu("node", device, f"GPU-{device}", device))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({TABLE: table()}, tmp_path / "model" / "model.safetensors")
    return make_config(
        tmp_path / "model", rollout__engine="remote", rollout__server__engine="trtllm", precision__name="bf16"
    )


@pytest.fixture
def served(config, tmp_path):
    """The server's directory; the server runs in threads of this process."""
    directory, base = open_directory(tmp_path / "servers"), wire.WeightsId(0, "base")
    shape = ModelShape("Qwen2ForCausalLM", 1, 8, 8, 1, 1, 8, VOCAB, False, 64)

    @contextmanager
    def locate(weights, tensors):
        assert tensors == {TABLE}
        with VersionReader(directory, tmp_path / "copy").whole(weights, tensors) as folder:
            yield folder

    worker = EngineWorker(lambda: build_hosted_engine(config, shape), lambda: base, locate)
    service = Service(worker, open_token(directory), wire.Limits(VOCAB, 64), 2**20)
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        runner = web.AppRunner(service.app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        publish(directory, ServerRecord(0, f"http://127.0.0.1:{port}", 1, "one"))
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(10)
    yield directory
    assert worker.stop(20)
    loop.call_soon_threadsafe(loop.stop)


def test_a_hosted_engine_serves_each_version_it_is_given_and_tells_its_own_log_probs(served, config):
    fleet = Fleet(served, servers=1, wait_s=20, timeout_s=20, retries=0)
    store = WeightStore(served, config.model.path)
    drawn = {}
    for version in (3, 4):
        weights = store.write([(TABLE, table(version))], version)
        told = []
        fleet.generate(Call(weights, PROMPTS, SAMPLING, SEEDS, lambda *news, told=told: told.append(news)))
        assert sorted((i, j) for i, j, _ in told) == [(i, j) for i, row in enumerate(SEEDS) for j in range(len(row))]
        raw = torch.log_softmax(table(version).double(), -1).numpy()
        for i, _, completion in told:
            assert completion.policy_version == version
            before = np.concatenate([PROMPTS[i][-1:], completion.token_ids[:-1]])
            np.testing.assert_allclose(completion.logprobs, raw[before, completion.token_ids], rtol=1e-6)
        drawn[version] = {(i, j): completion.token_ids.tolist() for i, j, completion in told}
    assert drawn[3] != drawn[4]


def test_a_client_that_goes_away_does_not_break_the_engine_for_the_next(served, config):
    fleet = Fleet(served, servers=1, wait_s=20, timeout_s=20, retries=0)
    weights = WeightStore(served, config.model.path).write([(TABLE, table(1))], 1)

    def leave(i, j, completion):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fleet.generate(Call(weights, PROMPTS, SAMPLING, SEEDS, leave))
    told = []
    fleet.generate(Call(weights, PROMPTS, SAMPLING, SEEDS, lambda *news: told.append(news)))
    assert len(told) == sum(map(len, SEEDS))
