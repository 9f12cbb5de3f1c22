"""A server of a mixture of experts gives the in-process engine's tokens, by the same experts, and says by which."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.errors import RunError
from tests.engines.servers.hosted import PROMPTS, SEEDS, SPEC, Engines
from tests.servers import Servers
from tests.training_runs import make_input, settings


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_models):
    folder = make_input(tmp_path_factory.mktemp("routes"))
    shutil.rmtree(folder / "model")
    shutil.copytree(tiny_models["qwen3_moe"], folder / "model")
    more = ("rollout.engine=remote", "rollout.remote.wait_s=60", "rollout.max_concurrent_tokens=4400")
    return settings(folder, folder / "run", *more)


def _same_by_the_same_experts(words):
    """Before and after a refit, and what is said of a server that sends no routes."""
    engines = Engines(words, "rollout.replay_routes=true", "rollout.remote.servers=1")
    for version in (0, 1):
        if version:
            engines.train(version)
        wanted = engines.local.generate(PROMPTS, SPEC, SEEDS)
        for row, wanted_row in zip(engines.assert_same(), wanted, strict=True):
            for one, other in zip(row, wanted_row, strict=True):
                np.testing.assert_array_equal(one.routes.prompt, other.routes.prompt)
                np.testing.assert_array_equal(one.routes.completion, other.routes.completion)
                assert one.routes.prompt is row[0].routes.prompt
    engines.remote.close()


def _without_routes(words):
    engines = Engines(words, "rollout.replay_routes=true", "rollout.remote.servers=1")
    with pytest.raises(RunError) as caught:
        engines.remote.generate(PROMPTS[:1], SPEC, SEEDS[:1])
    return str(caught.value)


def test_a_server_sends_the_routes_of_its_completions_through_a_refit(ranks, words):
    servers = Servers(Path(load_config(words).rollout.remote.directory))
    try:
        servers.start(0, words)
        ranks.run(_same_by_the_same_experts, words, tp=None)
        servers.close()
        servers.start(0, [*words, "rollout.replay_routes=false"])
        (said,) = ranks.run(_without_routes, words, tp=None)
        assert "sends completions without the experts" in said
    finally:
        servers.close()
