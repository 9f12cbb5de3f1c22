"""Sleep, wake and refit of the TensorRT-LLM engine: what it calls, in which order, against the strict stand-in."""

from __future__ import annotations

import pytest

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm import refit as trtllm_refit
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.errors import RunError
from tests import cuda_ipc
from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS, start, tokens
from tests.fake_trtllm_executor import TABLE, VOCAB, table


def test_a_step_calls_the_library_in_the_order_that_it_needs_and_the_new_weights_are_served(engine, fake):
    del fake.seen[:]
    new = table(seed=1)
    for version in (1, 2):
        engine.wake()
        before = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
        engine.sleep()
        engine.update_weights([(TABLE, new)], version)
        engine.wake()
        after = engine.generate(PROMPTS, SAMPLING, SEEDS)
        assert (tokens(after) != before) == (version == 1)
        assert {completion.policy_version for row in after for completion in row} == {version}
        engine.sleep()
    weights, cache = list(contract.WEIGHT_TAGS), [contract.KV_CACHE_TAG]
    asleep = [("forget_prefixes", ()), ("sleep", ([*weights, *cache],))]
    awake = [("wakeup", (weights,)), ("wakeup", (cache,))]
    calls = [
        (method, arguments if method != "update_weights" else arguments[0] is None) for method, arguments in fake.seen
    ]
    refit = [awake[0], ("update_weights", False), ("update_weights", True), awake[1]]
    assert calls == 2 * [*awake, *asleep, *refit, *asleep]


def test_what_the_learner_does_not_use_is_given_back_before_the_engine_takes_weights_and_kv_cache(
    engine, fake, monkeypatch
):
    monkeypatch.setattr(memory, "give_back", lambda: fake.seen.append(("give back", ())))
    del fake.seen[:]
    engine.update_weights([(TABLE, table(seed=1))], 1)
    engine.wake()
    assert [method for method, _ in fake.seen] == [
        "give back",
        "wakeup",
        *["update_weights"] * 2,
        "give back",  # the last bucket
        "give back",
        "wakeup",
    ]


def test_sleep_and_wake_may_be_called_again_and_a_wake_without_a_refit_serves_the_old_weights(engine):
    drawn = []
    for _ in range(2):
        engine.wake()
        engine.wake()
        drawn.append(tokens(engine.generate(PROMPTS, SAMPLING, SEEDS)))
        engine.sleep()
        engine.sleep()
    assert drawn[0] == drawn[1]


def test_an_engine_with_gpus_of_its_own_never_sleeps_and_is_refitted_in_place(fake):
    engine = start(colocated=False)
    before = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    engine.sleep()
    engine.update_weights([(TABLE, table(seed=1))], 7)
    engine.wake()
    after = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert tokens(after) != before
    assert after[0][0].policy_version == 7
    assert not {"sleep", "wakeup"} & {method for method, _ in fake.seen}
    engine.close()


def test_generating_asleep_is_refused(engine):
    with pytest.raises(RuntimeError, match="wake"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)


WRONG_ORDERS = {
    "the KV cache comes last": lambda client: client.resume([contract.KV_CACHE_TAG]),
    "the weights are released": lambda client: client.update_weights(None),
    "finalize without": lambda client: (client.resume(contract.WEIGHT_TAGS), client.update_weights(None)),
    "memory is released": lambda client: list(client.complete([(0, [1], {"end_id": -1})])),
    "before finalize": lambda client: (
        client.resume(contract.WEIGHT_TAGS),
        client.update_weights(payload()),
        client.resume([contract.KV_CACHE_TAG]),
    ),
    "keys and values are gone": lambda client: (
        client.resume(contract.WEIGHT_TAGS),
        client.resume([contract.KV_CACHE_TAG]),
        list(client.complete([(0, [1], {"end_id": -1})])),
        client.release([contract.KV_CACHE_TAG]),
        client.resume([contract.KV_CACHE_TAG]),
        list(client.complete([(0, [1], {"end_id": -1})])),
    ),
    "of what is released": lambda client: client.release([contract.KV_CACHE_TAG]),
    "unknown arguments": lambda client: list(client.complete([(0, [1], {"best_of": 2})])),
}


def payload():
    found, shared = trtllm_refit.payloads([(TABLE, table())], [Gpu("node", 0, "GPU-0", 0)])
    KEPT.extend(shared)
    return found


KEPT: list[memory.Bucket] = []
"""What a payload's handles lead to."""


@pytest.mark.parametrize("message", WRONG_ORDERS)
def test_the_stand_in_notices_a_wrong_order(engine, message):
    with pytest.raises(RunError, match=message):
        WRONG_ORDERS[message](engine._client)


def test_a_refit_waits_for_no_request_and_is_refused_while_some_are_under_way(engine, fake):
    engine.wake()
    problems = []

    def refit_meanwhile(i, j, completion):
        if not problems:
            with pytest.raises(RuntimeError, match="another call") as caught:
                engine.update_weights([(TABLE, table(1))], 1)
            problems.append(caught)

    engine.generate(PROMPTS, SAMPLING, SEEDS, refit_meanwhile)
    assert len(problems) == 1
    assert not any(method == "update_weights" for method, _ in fake.seen)


def test_a_refit_comes_in_buckets_and_never_holds_two_at_a_time(fake, monkeypatch):
    engine = start(refit_bucket_bytes=VOCAB * VOCAB * 4)
    produced = []

    def export():
        for name in ("a", TABLE, "b"):
            produced.append(name)
            assert len(fake.bucket_bytes) >= len(produced) - 2  # one being filled, the one before handed over
            yield name, table(1)

    left = cuda_ipc.left_behind()
    engine.update_weights(export(), 1)
    assert fake.bucket_bytes == 3 * [VOCAB * VOCAB * 4]
    assert engine.refit_bytes == 3 * VOCAB * VOCAB * 4
    assert cuda_ipc.left_behind() == left
    engine.close()
