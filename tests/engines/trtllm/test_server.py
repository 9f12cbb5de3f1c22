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
from nemo_aapo.engines.collective.refit import CollectiveRefit
from nemo_aapo.engines.deltas import VersionReader
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish
from nemo_aapo.engines.remote.dispatch import Call, Fleet
from nemo_aapo.engines.remote.service import Service
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.engines.remote.worker import EngineWorker
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.weights import Weights
from nemo_aapo.errors import LostRankError, RunError
from nemo_aapo.types import SamplingSpec
from tests import cuda_ipc, fake_trtllm
from tests.engines.trtllm.conftest import PROMPTS, SEEDS, STOP, pretend_gpus
from tests.fake_trtllm_executor import TABLE, VOCAB, table
from tests.tiny_models import make_config

SAMPLING = SamplingSpec(1.0, 16, (STOP,))
BASE = Weights(wire.WeightsId(0, "base"), None)


def make(monkeypatch, folder, **settings):
    """The stand-in of the library, and the configuration of a server that hosts it."""
    fake = fake_trtllm.install(monkeypatch)
    pretend_gpus(monkeypatch)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    save_file({TABLE: table()}, folder / "model" / "model.safetensors")
    engine = {"rollout__engine": "remote", "rollout__server__engine": "trtllm", "precision__name": "bf16"}
    return fake, make_config(folder / "model", **engine, **settings)


@pytest.fixture
def config(monkeypatch, tmp_path):
    return make(monkeypatch, tmp_path)[1]


@contextmanager
def serving(config, folder, workers=None):
    """The server's directory; the server runs in threads of this process, its worker is added to ``workers``."""
    directory, base = open_directory(folder / "servers"), wire.WeightsId(0, "base")
    shape = ModelShape("Qwen2ForCausalLM", 1, 8, 8, 1, 1, 8, VOCAB, False, 64)

    @contextmanager
    def locate(weights, tensors):
        assert tensors == {TABLE}
        with VersionReader(directory, folder / "copy").whole(weights, tensors) as found:
            yield found

    worker = EngineWorker(lambda: build_hosted_engine(config, shape), lambda: base, locate)
    if workers is not None:
        workers.append(worker)
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
    assert ready.wait(60)
    worker.built.result(60)
    yield directory
    assert worker.stop(20)
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture
def served(config, tmp_path):
    with serving(config, tmp_path) as directory:
        yield directory


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


EVALUATION = SamplingSpec(0.6, 16, (STOP,), top_p=0.95)
"""At the defaults of an evaluation, which may be another temperature than that of the server's rollouts."""


def test_a_server_answers_at_another_temperature_than_its_own_rollouts(served):
    told = []
    fleet = Fleet(served, servers=1, wait_s=20, timeout_s=20, retries=0)
    fleet.generate(Call(BASE, PROMPTS, EVALUATION, SEEDS, lambda *news: told.append(news)))
    assert len(told) == sum(map(len, SEEDS))
    tempered = torch.log_softmax(table().double() / EVALUATION.temperature, -1).numpy()
    for i, _, completion in told:
        before = np.concatenate([PROMPTS[i][-1:], completion.token_ids[:-1]])
        np.testing.assert_allclose(completion.logprobs, tempered[before, completion.token_ids], rtol=1e-5)


def test_what_its_library_has_not_is_refused_in_words_and_the_server_goes_on(monkeypatch, tmp_path, capfd):
    fake, config = make(monkeypatch, tmp_path)
    fake.raw_logprobs = True
    with serving(config, tmp_path) as directory:
        fleet = Fleet(directory, servers=1, wait_s=20, timeout_s=20, retries=0, log=lambda text: None)
        call = Call(BASE, PROMPTS, EVALUATION, SEEDS, lambda *news: None)
        with pytest.raises(RunError, match=r"HTTP 400: temperature=0\.6: .* log-probs before temperature"):
            fleet.generate(call)
        assert len(draw(fleet, BASE)) == sum(map(len, SEEDS))
    assert "Traceback" not in capfd.readouterr().err


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


def test_a_server_whose_engine_can_not_go_on_ends_and_does_not_keep_the_gpus(monkeypatch, tmp_path):
    fake, config = make(monkeypatch, tmp_path)
    workers: list[EngineWorker] = []
    with serving(config, tmp_path, workers) as directory:
        fake.fail_request = fake.requests + 1
        for _ in range(2):  # the request that fails, and whatever comes next
            with pytest.raises(RunError):
                draw(Fleet(directory, servers=1, wait_s=1, timeout_s=20, retries=0, log=lambda text: None), BASE)
        with pytest.raises(LostRankError, match=r"can't go on: .*illegal memory access"):
            raise workers[0].lost.result(20)


def draw(fleet, weights):
    told = {}
    fleet.generate(Call(weights, PROMPTS, SAMPLING, SEEDS, lambda i, j, c: told.update({(i, j): c.token_ids.tolist()})))
    return told


def _taking_turns(folder):
    """Tokens before and after a refit out of GPU memory, what the library was asked, and a refusal."""
    from nemo_aapo.engines.ipc.sender import MemorySender

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake, config = make(monkeypatch, folder, rollout__refit="ipc")
        with serving(config, folder) as directory:
            fleet = Fleet(directory, servers=1, wait_s=1, timeout_s=20, retries=0, log=lambda text: None)
            weights = lambda: [(TABLE, table(1))]  # noqa: E731
            sender = MemorySender(None, VOCAB, weights, config.model.path, timeout_s=20, patience_s=5)
            sender.digest, sender._device = lambda: "0" * 16, torch.device("cuda", 0)
            sender._name, sender._names = "GPU-0", ["GPU-0"]
            before = draw(fleet, BASE)
            fleet.sleep()
            del fake.seen[:]
            served, sent = CollectiveRefit(fleet, sender).bring(1)
            after = draw(fleet, served)
            seen = [(method, arguments and arguments[0]) for method, arguments in fake.seen]
            left = cuda_ipc.left_behind()
            sender._name, sender._names = "GPU-9", ["GPU-9"]
            with pytest.raises(RunError) as refused:
                CollectiveRefit(fleet, sender).bring(2)
            sender.close()
    return before, after, sent, seen, left, str(refused.value)


def test_learner_and_server_take_turns_and_the_workers_open_the_learners_memory_themselves(ranks, tmp_path):
    ((before, after, sent, seen, left, refused),) = ranks.run(_taking_turns, tmp_path, tp=None)
    assert before != after
    assert sent == VOCAB * VOCAB * 4
    weights, cache = list(contract.WEIGHT_TAGS), [contract.KV_CACHE_TAG]
    assert [(method, tags) for method, tags in seen if method == "wakeup"] == [("wakeup", weights), ("wakeup", cache)]
    assert [method for method, _ in seen] == ["wakeup", "update_weights", "update_weights", "wakeup"]
    assert seen[1][1].keys() == {"GPU-0"}
    assert seen[2][1] is None
    assert left == []
    assert "holds no weights on GPU-0, which this server computes on, but on GPU-9" in refused
