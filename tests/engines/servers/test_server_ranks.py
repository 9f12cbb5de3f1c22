"""Servers of several ranks: the tokens of one process, weights by files or out of memory, and one common end."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.engines.remote import wire
from tests.engines.servers.hosted import LONG, PROMPTS, SPEC, Engines
from tests.servers import Servers, ask, wait_until_ready
from tests.training_runs import make_input, settings

pytestmark = pytest.mark.ranks  # the servers are ranks too


@contextlib.contextmanager
def server(folder: Path, words: list[str], tp: int, pp: int = 1, ep: int = 1):
    """A server of so many ranks, ready; the words of a trainer."""
    words = settings(
        folder,
        folder / "run",
        "rollout.engine=remote",
        "rollout.remote.wait_s=60",
        "rollout.remote.timeout_s=60",
        "rollout.max_concurrent_tokens=2200",
        *words,
    )
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "expert_parallel_size": ep}
    started = Servers(Path(load_config(words).rollout.remote.directory))
    try:
        record = started.start(0, [*words, *(f"rollout.server.{k}={v}" for k, v in sizes.items())], ranks=tp * pp)
        assert (record.ranks, record.layout) == (tp * pp, f"TP {tp} x PP {pp}")
        wait_until_ready(started.directory, 0)
        yield started, words
    finally:
        started.close()


def _same_tokens(words, refit, versions):
    engines = Engines(words, f"rollout.refit={refit}")
    engines.tolerance = 1e-5  # sums over ranks are taken in another order
    engines.assert_same()
    for version in range(1, versions + 1):
        engines.train(version)
        engines.assert_same()
    engines.remote.generate(PROMPTS, LONG, [[1, 2, 3]] * len(PROMPTS), lambda i, j, completion: True)
    engines.assert_same(SPEC)  # also after a batch that it broke off, as nobody waited any more
    engines.remote.close()


def test_tp2_pp2_gives_one_processs_tokens_and_a_rank_that_dies_ends_its_server(ranks, tmp_path):
    with server(make_input(tmp_path), [], tp=2, pp=2) as (started, words):
        ranks.run(_same_tokens, words, "files", 1, tp=None)
        started.others[1].kill()
        started.processes[0].join(120)
        assert started.processes[0].exitcode == 1
        for process in started.others:
            process.join(120)
            assert not process.is_alive()
        said = started.log(0).read_text()
        assert "another rank is gone" in said
        assert "Traceback" not in said
        assert started.records() == []


IN_FLIGHT = ("rollout.max_lag=2", "rollout.recompute_kv=true", "algorithm.importance_weight_cap=2.0")


def _in_flight(words):
    """New weights twice in the midst of completions; each token has the log-prob of its version's forward pass."""
    engines = Engines(words, *IN_FLIGHT)
    engines.tolerance = 1e-5  # sums over ranks are taken in another order
    told, models = {}, [_plain_model(engines)]
    seeds = [[10 * i + j for j in range(6)] for i in range(len(PROMPTS))]
    pending = engines.remote.start(PROMPTS, LONG, seeds, lambda i, j, c: told.__setitem__((i, j), c))
    for version in (1, 2):
        before = len(told)
        while len(told) <= before:
            assert pending.error() is None
            time.sleep(0.005)
        engines.train(version)
        models.append(_plain_model(engines))
    assert [len(row) for row in pending.result()] == [6] * len(PROMPTS)
    assert pending.error() is None
    assert {v for c in told.values() for v in c.token_versions.tolist()} == {0, 1, 2}
    assert any(c.versions is not None for c in told.values())
    assert max(len(c.token_ids) for c in told.values()) <= LONG.max_new_tokens
    for (i, _), completion in told.items():
        expected = np.stack([_plain(model, PROMPTS[i], completion.token_ids) for model in models])
        chosen = expected[completion.token_versions, np.arange(len(completion.token_ids))]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-4)
    engines.assert_same(SPEC)  # in order again, on the newest weights
    engines.remote.close()


def _plain_model(engines):
    """transformers' model with the weights as they are now."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engines.map.path).eval()
    model.load_state_dict({name: tensor.clone() for name, tensor in engines.exported()}, strict=False)
    return model


def _plain(model, prompt, tokens):
    """float32 [T], log-probs of a completion's tokens by a whole forward pass."""
    import torch

    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / LONG.temperature, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def test_all_ranks_of_a_server_take_new_weights_between_the_same_two_tokens(ranks, tmp_path):
    with server(make_input(tmp_path), [], tp=2) as (started, words):
        ranks.run(_in_flight, words, tp=None)
        started.processes[0].terminate()
        for process in (started.processes[0], *started.others):
            process.join(120)
            assert process.exitcode == 0


def test_ranks_that_share_experts_take_weights_from_the_trainers_memory_and_end_with_a_signal(ranks, tmp_path):
    with server(make_input(tmp_path, experts=True), [], tp=2, ep=2) as (started, words):
        ranks.run(_same_tokens, words, "collective", 2, tp=None)
        has = wire.decode_weights_id(ask(started.directory, 0, "/v1/ready")[1])
        assert has.policy_version == 2
        time.sleep(0.1)
        started.processes[0].terminate()
        for process in (started.processes[0], *started.others):
            process.join(120)
            assert process.exitcode == 0
        assert started.records() == []
