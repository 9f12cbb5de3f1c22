"""Whatever servers do to the answers, each completion arrives exactly once, or an error says which server did what."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import signal
import socket
import threading
import time
import weakref

import aiohttp
import numpy as np
import pytest

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.collective.refit import CollectiveRefit
from nemo_aapo.engines.remote import dispatch, servers, wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, publish
from nemo_aapo.engines.remote.dispatch import Call, Work, distribute
from nemo_aapo.engines.remote.engine import RemoteEngine
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.errors import ConfigError, Interrupted, RequestError, RunError
from nemo_aapo.run import stop
from tests.engines.remote.scripted_server import MISDEEDS, SPEC, WEIGHTS, always, make_call, wait_for
from tests.engines.remote.test_service import TOKEN, Server


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_server_that_misbehaves_costs_no_completion_and_doubles_none(start, fleet, misdeed):
    said = []
    bad, good = start(always(f"{misdeed} 3"), always("well"))
    call, told, wanted = make_call([4] * 6)
    limit = {"timeout_s": 1.0} if misdeed in ("hang", "drip") else {}
    fleet(2, log=said.append, **limit).generate(call)
    assert sorted(told) == sorted(wanted)
    assert bad.asked
    assert len(good.asked) == 2  # its own share, and what the other left over
    assert len(said) == 1
    assert "rollout server 0" in said[0]
    fresh = {seed for asked in good.asked for row in asked.seeds for seed in row}
    kept = 0 if misdeed in ("refuse", "html", "stale") else 3
    assert len(fresh) == 24 - kept  # what had come before the failure counts


def test_any_sequence_of_misdeeds_of_two_of_three_servers_is_survived(start, fleet):
    rng = random.Random(1)
    quick = [misdeed for misdeed in MISDEEDS if misdeed not in ("hang", "drip")]

    def script() -> str:
        return f"{rng.choice([*quick, 'well'])} {rng.randrange(30)}"

    start(script, always("well"), script)
    for round_ in range(25):
        call, told, wanted = make_call([rng.randrange(5) for _ in range(rng.randrange(12))])
        fleet(3).generate(call)
        assert sorted(told) == sorted(wanted), round_


def test_a_prompt_that_fails_everywhere_ends_with_each_servers_reason(start, fleet):
    start(always("refuse"), always("fail"))
    call, told, _ = make_call([2])
    with pytest.raises(RunError, match=r"prompt 0 .*2 times \(rollout.remote.retries=1\)") as error:
        fleet(2, retries=1).generate(call)
    for index, reason in ((0, "HTTP 500: out of memory"), (1, "the engine failed")):
        assert f"server {index} (http://127.0.0.1:" in str(error.value)
        assert reason in str(error.value)
    assert told == []


def test_no_server_left_is_an_error_in_time_that_names_each(start, fleet):
    servers = start(always("well"), always("well"))
    ready = fleet(2)
    ready.prepare(WEIGHTS)
    for server in servers:
        server.close()
    with pytest.raises(
        RunError, match=r"0 rollout servers are usable, rollout.remote.min_servers=1 are needed"
    ) as error:
        ready.generate(make_call([2, 2])[0])
    assert str(error.value).count("can't be reached") == 2
    assert all(f"server {i} (" in str(error.value) for i in (0, 1))


def test_a_step_goes_on_with_those_that_are_left_and_waits_for_no_more_than_min_servers(start, fleet):
    _, second = start(always("well"), always("well"))
    one, two = fleet(2), fleet(2, min_servers=2)
    for made in (one, two):
        made.prepare(WEIGHTS)
    second.close()
    call, told, wanted = make_call([2, 2])
    one.generate(call)
    assert sorted(told) == sorted(wanted)
    with pytest.raises(RunError, match=r"1 rollout servers are usable, rollout.remote.min_servers=2 are needed"):
        two.generate(make_call([2, 2])[0])
    *_, third = start(always("well"))
    call, told, wanted = make_call([2, 2])
    two.generate(call)
    assert sorted(told) == sorted(wanted)
    assert third.refits == [WEIGHTS]
    assert third.asked


def test_a_directory_that_is_removed_in_the_middle_is_an_error_that_says_so(start, fleet, tmp_path):
    start(always("well"))
    ready = fleet()
    ready.prepare(WEIGHTS)
    shutil.rmtree(tmp_path / "servers")
    with pytest.raises(RunError, match="servers: the rollout servers' directory is gone"):
        ready.generate(make_call([2])[0])


def test_a_server_of_another_protocol_version_is_said_to_be_one(fleet, tmp_path, monkeypatch):
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    with monkeypatch.context() as other_version:
        other_version.setattr(wire, "API", "/v2")
        server = Server(loop)
    directory = open_directory(tmp_path / "servers")
    (directory / "token").write_text(TOKEN)
    (directory / "token").chmod(0o600)
    publish(directory, ServerRecord(0, f"http://127.0.0.1:{server.listener.getsockname()[1]}", 1, "other"))
    with pytest.raises(RunError, match=r"server 0 .*of another version of this code"):
        fleet(1, wait_s=2.0).prepare(WEIGHTS)
    assert server.harness.worker.stop(10)
    loop.call_soon_threadsafe(loop.stop)


def test_servers_that_never_come_are_missed_by_number(start, fleet, tmp_path):
    with pytest.raises(RunError, match=r"none has announced itself in .*servers"):
        fleet(1, wait_s=0.3).prepare(WEIGHTS)
    start(always("well"))
    with pytest.raises(RunError, match=r"1 rollout servers are usable, rollout.remote.servers=2 are needed:\n.*ready"):
        fleet(2, wait_s=2.0).prepare(WEIGHTS)


def test_weights_that_are_not_finite_are_the_policys_fault_and_tried_nowhere_else(start, fleet):
    _, other = start(always("not_finite"), always("well"))
    with pytest.raises(FloatingPointError, match="not finite"):
        fleet(2).generate(make_call([1])[0])
    assert not other.asked


def test_what_an_engine_cannot_do_is_the_requests_fault_and_asked_nowhere_else(start, fleet):
    one, other = start(always("cannot"), always("cannot"))
    made = fleet(2, log=(said := []).append)
    with pytest.raises(RequestError, match=r"rollout server 0 \(http://.*\): HTTP 400: temperature=0\.6 can't be had"):
        made.generate(make_call([1])[0])
    assert (len(one.asked), len(other.asked), said) == (1, 0, [])


def test_a_server_that_hangs_is_waited_for_once_by_sleep_and_refit(start, fleet, tmp_path, monkeypatch):
    """It would cost a deadline in each step otherwise."""
    monkeypatch.setattr(servers, "_PROBE", aiohttp.ClientTimeout(total=0.2))
    [well] = start(always("well"))
    made = fleet(timeout_s=3600, log=(said := []).append)
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # the kernel takes connections, and nobody answers
        hanging.setblocking(False)
        publish(tmp_path / "servers", ServerRecord(1, f"http://127.0.0.1:{hanging.getsockname()[1]}", 1, "hangs"))
        refit = CollectiveRefit(made, None)
        others = lambda session: refit._without(session, WEIGHTS.id, set(), 0.0)  # noqa: E731
        for _ in range(2):
            made.sleep()
            assert asyncio.run(made.with_session(others)) == [well.record]
        hanging.accept()[0].close()
        with pytest.raises(BlockingIOError):
            hanging.accept()
    assert well.slept == 2
    assert [line.split(" ")[2] for line in said] == ["1"]


def test_a_server_that_was_restarted_loads_the_weights_before_it_is_used(start, fleet):
    (first,) = start(always("well"))
    same = fleet()
    same.prepare(WEIGHTS)
    assert first.refits == [WEIGHTS]
    first.close()
    _, second = start(always("well"))
    call, told, wanted = make_call([3, 3])
    same.generate(call)
    assert sorted(told) == sorted(wanted)
    assert second.refits == [WEIGHTS]
    same.generate(make_call([1])[0])
    assert second.refits == [WEIGHTS]  # once


def test_work_goes_where_the_least_is_to_be_drawn_the_longest_expected_first_and_a_group_stays_whole(start, fleet):
    rng = random.Random(0)
    for _ in range(200):
        works = [Work(i, [0], rng.randrange(1, 100)) for i in range(rng.randrange(20))]
        works[3:4] = [Work(3, [0, 1], 40)] if len(works) > 3 else []
        busy = [rng.randrange(200) for _ in range(rng.randrange(1, 5))]
        parts = distribute(works, busy)
        assert sorted(w.prompt for part in parts for w in part) == [w.prompt for w in works]
        loads = list(busy)
        for work in sorted(works, key=lambda work: work.prompt if len(work.left) == 1 else -1):
            (taker,) = [k for k, part in enumerate(parts) if work in part]
            assert loads[taker] == min(loads)
            loads[taker] += work.tokens
        for part in parts:
            assert [w.prompt for w in part] == sorted(w.prompt for w in part)
    few = [[len(part) for part in distribute([Work(0, [0], 9)] * 2, [0] * 8, (rank, 4))] for rank in range(4)]
    assert [sum(column) for column in zip(*few, strict=True)] == [1] * 8  # ranks with two prompts each
    servers = start(always("well"), always("well"))
    call, _, _ = make_call([8, 1, 1, 1, 1])
    fleet(2).generate(call)
    asked = [sorted(len(row) for request in server.asked for row in request.seeds) for server in servers]
    assert sorted(asked) == [[1, 1, 1, 1], [8]]


def test_much_work_goes_in_several_requests(start, fleet, monkeypatch):
    monkeypatch.setattr(dispatch, "REQUEST_TOKENS", 6)
    (server,) = start(always("well"))
    call, told, wanted = make_call([2] * 12)
    fleet().generate(call)
    assert sorted(told) == sorted(wanted)
    sizes = [sum(map(len, request.prompts)) for request in server.asked]
    assert len(sizes) > 5
    assert max(sizes) <= 6


def test_an_error_of_the_callback_is_the_callers_own(start, fleet):
    (server,) = start(always("well"))

    def fail(i, j, completion):
        raise TimeoutError("a reward's")

    call = make_call([2, 2])[0]
    with pytest.raises(TimeoutError, match="a reward's"):
        fleet().generate(Call(call.weights, call.prompts, call.sampling, call.seeds, fail))
    assert len(server.asked) == 1


def test_once_it_is_enough_the_connections_are_closed_and_the_next_call_goes_on(start, fleet, tmp_path):
    """As a stop breaks a rollout off; servers drop what nobody waits for."""
    first, second = start(lambda: "hang 3", lambda: "hang 3")
    engine = RemoteEngine(fleet(2, timeout_s=60), WeightStore(tmp_path, "model"), WEIGHTS, None)
    prompts, seeds, ended = [np.array([5, n], np.int32) for n in range(4)], [[1, 2, 3]] * 4, []
    asked = (WEIGHTS, prompts, SPEC, seeds)
    began = time.monotonic()
    outcome = engine._ask_servers(*asked, lambda i, j, completion: ended.append((i, j)) or len(ended) == 4)
    assert time.monotonic() - began < 30  # and not the timeout of servers that are silent
    assert [(i, j) for i, j, _ in outcome] == ended
    assert 4 <= len(ended) <= 6  # what servers had sent by then comes too, and no more: each hangs after three
    first.script = second.script = lambda: "well"
    assert len(engine._ask_servers(*asked, None)) == 12


def test_an_engine_keeps_no_completion_of_a_call_that_was_waited_for(start, fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "is_model_parallel_source", lambda: True)
    monkeypatch.setattr(parallel, "broadcast_when_done", lambda action: action())
    start(always("well"))
    engine = RemoteEngine(fleet(1), WeightStore(tmp_path, "model"), WEIGHTS, None)
    begun = engine.start([np.array([5], np.int32)], SPEC, [[1]])
    ((completion,),) = begun.result()
    tokens = weakref.ref(completion.token_ids)
    del begun, completion
    wait_for(lambda: gc.collect() is None or tokens() is None)


@pytest.mark.parametrize("scripts", [(), (lambda: "hang 3",)], ids=["none_comes", "one_hangs"])
def test_a_stop_ends_the_waiting_for_servers(start, fleet, monkeypatch, scripts):
    monkeypatch.setattr(stop, "PATIENCE_S", 0.1)
    start(*scripts)
    waiting = fleet(wait_s=600, timeout_s=600, patience_s=0.1)
    with stop.StopSignal(speak=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1 came while waiting for rollout servers"):
            waiting.generate(make_call([2, 2])[0])


def test_a_server_that_is_not_admitted_is_told_of_no_weights(start, fleet):
    def admit(server):
        raise ConfigError(f"server {server.index} computes otherwise")

    (server,) = start(lambda: "well")
    with pytest.raises(ConfigError, match="server 0 computes otherwise"):
        fleet(admit=admit).prepare(WEIGHTS)
    assert not server.refits
