"""A server of TensorRT-LLM in an environment of its own: none of the learner's packages, its weights by handle."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_aapo.config.compose import load_config
from nemo_aapo.engines.remote.directory import read_servers
from nemo_aapo.engines.remote.wire import Weights, WeightsId
from nemo_aapo.types import SamplingSpec
from nemo_aapo.utils.safetensors import model_digest
from tests.fake_trtllm_executor import TABLE, VOCAB, table
from tests.servers import ROOT, ask, wait_until_ready
from tests.training_runs import make_input, settings

pytestmark = pytest.mark.slow
OF_TENSORRT_LLM = {"torch", "numpy", "safetensors", "pyyaml", "tqdm", "packaging", "idna", "dill", "typing_extensions"}
"""Distributions that TensorRT-LLM 1.2.1 requires, or what it requires does (torch, transformers, datasets)."""


@pytest.fixture
def words(tmp_path):
    engine = ("rollout.engine=remote", "rollout.server.engine=trtllm", "rollout.refit=ipc", "precision=bf16")
    return settings(make_input(tmp_path), tmp_path / "run", *engine, "rollout.max_concurrent_tokens=2200")


def named(distribution):
    return re.sub(r"[-_.]+", "_", distribution).lower()


def required():
    text = (ROOT / "requirements" / "trtllm_server.txt").read_text()
    return {named(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}


def _refitted(directory, model):
    """A trainer's rank: hands over weights in the memory of "GPU-0"; their name."""
    import torch

    from nemo_aapo.engines.collective.refit import CollectiveRefit
    from nemo_aapo.engines.ipc import memory
    from nemo_aapo.engines.ipc.sender import MemorySender
    from nemo_aapo.engines.remote.dispatch import Fleet
    from nemo_aapo.models.reader import WeightFiles
    from tests import cuda_ipc

    fleet = Fleet(directory, servers=1, wait_s=20, timeout_s=40, retries=0)
    weights = lambda: [*WeightFiles(Path(model)).items(), (TABLE, table(1))]  # noqa: E731
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(memory, "share_on_gpu", cuda_ipc.share_on_gpu)
        sender = MemorySender(None, VOCAB, weights, model, timeout_s=40, patience_s=5)
        sender.bucket_bytes = 20_000
        sender.digest, sender._device = lambda: "0" * 16, torch.device("cuda", 0)
        sender._name, sender._names = "GPU-0", ["GPU-0"]
        served, _ = CollectiveRefit(fleet, sender).bring(1)
        sender.close()
    return served, cuda_ipc.left_behind()


def test_it_takes_weights_by_handles_sleeps_and_ends_without_megatron_transformers_and_nemo(words, tmp_path, ranks):
    from nemo_aapo.engines.remote.dispatch import Call, Fleet
    from tests.engines.trtllm.conftest import PROMPTS, SEEDS

    config = load_config(words)
    directory, log, record = Path(config.rollout.remote.directory), tmp_path / "log", tmp_path / "imported.json"
    command = [sys.executable, "-m", "tests.engines.trtllm.serve_alone", record, *words]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*map(str, command), f"rollout.server.directory={directory}"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 120
        while not (directory.exists() and read_servers(directory)):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        wait_until_ready(directory, 0)
        fleet = Fleet(directory, servers=1, wait_s=20, timeout_s=20, retries=0)
        weights = Weights(WeightsId(0, model_digest(config.model.path)), None)
        for version in range(2):
            told = []
            call = Call(weights, PROMPTS, SamplingSpec(1.0, 8, (3,)), SEEDS, lambda *news, told=told: told.append(news))
            fleet.generate(call)
            assert len(told) == sum(map(len, SEEDS))
            raw = torch.log_softmax(table(version).double(), -1).numpy()
            for i, _, completion in told:
                before = np.concatenate([PROMPTS[i][-1:], completion.token_ids[:-1]])
                np.testing.assert_allclose(completion.logprobs, raw[before % VOCAB, completion.token_ids], rtol=1e-6)
            assert ask(directory, 0, "/v1/sleep", b"") == (200, {"status": "asleep"})
            if version == 0:
                ((weights, left),) = ranks.run(_refitted, directory, config.model.path, tp=None)
                assert left == []
        server.terminate()
        assert server.wait(120) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(30)
    distributions = importlib.metadata.packages_distributions()
    imported = {named(name) for package in json.loads(record.read_text()) for name in distributions[package]}
    assert "aiohttp" in imported
    assert imported <= required() | OF_TENSORRT_LLM
    assert required() - imported <= {"ray", "msgpack"}  # of the library, which the stand-in has not
