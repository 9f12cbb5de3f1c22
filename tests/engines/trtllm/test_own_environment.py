"""A server of TensorRT-LLM in an environment of its own: it needs none of the learner's packages, and takes turns."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.engines.remote.directory import read_servers
from nemo_aapo.engines.remote.wire import Weights, WeightsId
from nemo_aapo.types import SamplingSpec
from nemo_aapo.utils.safetensors import model_digest
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


def test_it_serves_sleeps_and_ends_without_megatron_transformers_and_nemo(words, tmp_path):
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
        fleet, told = Fleet(directory, servers=1, wait_s=20, timeout_s=20, retries=0), []
        weights = Weights(WeightsId(0, model_digest(config.model.path)), None)
        for _ in range(2):
            call = Call(weights, PROMPTS, SamplingSpec(1.0, 8, (3,)), SEEDS, lambda *news: told.append(news))
            fleet.generate(call)
            assert ask(directory, 0, "/v1/sleep", b"") == (200, {"status": "asleep"})
        assert len(told) == 2 * sum(map(len, SEEDS))
        server.terminate()
        assert server.wait(30) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(30)
    distributions = importlib.metadata.packages_distributions()
    imported = {named(name) for package in json.loads(record.read_text()) for name in distributions[package]}
    assert "aiohttp" in imported
    assert imported <= required() | OF_TENSORRT_LLM
    assert required() - imported <= {"ray", "msgpack"}  # of the library, which the stand-in has not
