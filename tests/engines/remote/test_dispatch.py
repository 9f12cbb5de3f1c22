"""Whatever servers do to the answers, each completion arrives exactly once, or an error says which server did what.

Real HTTP against scripted servers: their completions are a function of prompt and seed, their misdeeds of a script.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from aiohttp import web

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.messages import dump_object, load_object
from nemo_aapo.engines.remote import dispatch, wire
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish
from nemo_aapo.engines.remote.dispatch import Call, Fleet, Work, distribute
from nemo_aapo.engines.remote.engine import RemoteEngine
from nemo_aapo.engines.remote.queues import Queues, Ticket
from nemo_aapo.engines.remote.weight_store import WeightStore
from nemo_aapo.errors import ConfigError, Interrupted, RunError
from nemo_aapo.run import stop
from nemo_aapo.types import Completion, SamplingSpec
from tests.engines.remote.test_service import TOKEN, Server

WEIGHTS = wire.Weights(wire.WeightsId(5, "5" * 64), "weights/v5-55555555/manifest.json")
SPEC = SamplingSpec(temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
VOCABULARY = 1000
LIMITS = wire.Limits(VOCABULARY, 100)
TIMEOUT_S = 0.3


def draw(prompt: np.ndarray, seed: int, version: int = 5) -> Completion:
    tokens = np.random.default_rng([seed, *prompt]).integers(0, 1000, 1 + seed % 7).astype(np.int32)
    return Completion(tokens, (-tokens / 7).astype(np.float32), "length", version)


class ScriptedServer:
    """Serves well, but for what its script says of a ``generate`` request. Starts with the base model's weights."""

    def __init__(self, index: int, token: str, script: Callable[[], str] = lambda: "well") -> None:
        self.script, self.token, self.asked = script, token, []
        self.weights, self.refits = wire.WeightsId(0, "0" * 64), []
        self.released = threading.Event()
        """Until then a ``generate`` whose script says ``until`` goes on."""
        self.record: ServerRecord | None = None
        self._index, self._loop, self._ready = index, asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def start() -> None:
            app = web.Application(client_max_size=2**30)
            app.router.add_get("/v1/ready", self._ready_)
            app.router.add_post("/v1/update_weights", self._update)
            app.router.add_post("/v1/generate", self._generate)
            self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            port = self._runner.addresses[0][1]
            self.record = ServerRecord(self._index, f"http://127.0.0.1:{port}", 1, f"{self._index}-{port}")
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _ready_(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {self.token}"
        return web.Response(body=wire.encode_weights_id(self.weights))

    async def _update(self, request: web.Request) -> web.Response:
        weights = wire.decode_weights(load_object(await request.read()))
        self.refits.append(weights)
        self.weights = weights.id
        return web.Response(body=wire.encode_weights_id(self.weights))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = wire.decode_request(load_object(await request.read()), LIMITS)
        self.asked.append(asked)
        misdeed, _, at = self.script().partition(" ")
        if asked.weights != self.weights or misdeed == "other":
            return web.json_response({"error": "other weights", "reason": "other_weights"}, status=409)
        if misdeed == "loading":
            return web.json_response({"error": "no whole weights are loaded", "reason": "no_weights"}, status=503)
        if misdeed == "refuse":
            return web.json_response({"error": "out of memory", "reason": "engine"}, status=500)
        if misdeed == "not_finite":
            return web.json_response({"error": "log-probs are not finite", "reason": "not_finite"}, status=500)
        if misdeed == "html":
            return web.Response(text="<html>", status=502)
        response = web.StreamResponse()
        await response.prepare(request)
        lines = [
            wire.encode_completion(i, j, draw(prompt, seed, 4 if misdeed == "stale" else asked.weights.policy_version))
            for i, (prompt, row) in enumerate(zip(asked.prompts, asked.seeds, strict=True))
            for j, seed in enumerate(row)
        ]
        random.Random(len(lines)).shuffle(lines)  # as they end, not as they were asked for
        at = int(at or 0) % (len(lines) + 1)
        for line in lines[:at]:
            await response.write(line)
        if misdeed == "until":
            while not self.released.is_set():
                await asyncio.sleep(0.005)
        if misdeed == "hang":
            await asyncio.sleep(60)
        if misdeed == "drop":
            request.transport.abort()
            return response
        if misdeed == "drip":
            for _ in range(200):
                await response.write(b" ")
                await asyncio.sleep(0.05)
        following = lines[at % len(lines)] if lines else b"{}"
        extra = {
            "long": spoilt(following, token_ids=[1] * 9, logprobs=[-1.0] * 9),
            "negative": spoilt(following, token_ids=[-1], logprobs=[-1.0]),
            "outside": spoilt(following, token_ids=[VOCABULARY], logprobs=[-1.0]),
            "infinite": spoilt(following, token_ids=[1], logprobs=[-1e39]),
            "bored": spoilt(following, finish_reason="bored"),
            "garbage": b"{not json\n",
            "twice": lines[at - 1],
            "unasked": lines[0].replace(b'"i":0', b'"i":99').replace(b'"j":0', b'"j":99').replace(b'"j":1', b'"j":98'),
            "fail": dump_object({"error": "the engine failed", "reason": "engine"}),
        }
        if misdeed in extra:
            await response.write(extra[misdeed])
        for line in lines[at:] if misdeed != "short" else []:
            await response.write(line)
        await response.write(dump_object({"done": len(lines)}))
        return response


def spoilt(line: bytes, **fields) -> bytes:
    return dump_object({**load_object(line), **fields})


MISDEEDS = (
    "refuse", "html", "stale", "hang", "drip", "drop", "garbage", "twice", "unasked", "fail", "short", "long",
    "negative", "outside", "infinite", "bored",
)  # fmt: skip


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., list[ScriptedServer]]]:
    """``start(script, script, ...)``: servers by their scripts, announced in ``tmp_path / "servers"``."""
    directory, started = open_directory(tmp_path / "servers"), []

    def start(*scripts: Callable[[], str]) -> list[ScriptedServer]:
        for script in scripts:
            started.append(ScriptedServer(len(started), open_token(directory), script))
            publish(directory, started[-1].record)
        return started

    yield start
    for server in started:
        server.close()


@pytest.fixture
def fleet(tmp_path) -> Callable[..., Fleet]:
    def make(servers: int = 1, **changes) -> Fleet:
        settings = {"wait_s": 2.0, "timeout_s": TIMEOUT_S, "retries": 3, "log": lambda text: None}
        settings |= {"vocab_size": VOCABULARY, **changes}
        return Fleet(tmp_path / "servers", servers=servers, **settings)

    return make


def make_call(sizes: list[int]) -> tuple[Call, list[tuple], list[tuple]]:
    """A call for groups of these sizes; what is told as it goes on; what should be."""
    rng = np.random.default_rng(sum(sizes))
    prompts = [rng.integers(0, 1000, 1 + i % 5).astype(np.int32) for i in range(len(sizes))]
    seeds = [[1000 * i + j for j in range(size)] for i, size in enumerate(sizes)]
    told: list[tuple] = []
    call = Call(WEIGHTS, prompts, SPEC, seeds, lambda i, j, c: told.append((i, j, c.token_ids.tobytes())))
    wanted = [
        (i, j, draw(prompts[i], seed).token_ids.tobytes()) for i, row in enumerate(seeds) for j, seed in enumerate(row)
    ]
    return call, told, wanted


def always(misdeed: str) -> Callable[[], str]:
    return lambda: misdeed


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_server_that_misbehaves_costs_no_completion_and_doubles_none(start, fleet, misdeed):
    said = []
    bad, good = start(always(f"{misdeed} 3"), always("well"))
    call, told, wanted = make_call([4] * 6)
    fleet(2, log=said.append).generate(call)
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
    ready = fleet(2, wait_s=0.5)
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
    one, two = fleet(2), fleet(2, min_servers=2, wait_s=0.5)
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
        fleet(1, wait_s=0.3).prepare(WEIGHTS)
    assert server.harness.worker.stop(10)
    loop.call_soon_threadsafe(loop.stop)


def test_servers_that_never_come_are_missed_by_number(start, fleet, tmp_path):
    with pytest.raises(RunError, match=r"none has announced itself in .*servers"):
        fleet(1, wait_s=0.3).prepare(WEIGHTS)
    start(always("well"))
    with pytest.raises(RunError, match=r"1 rollout servers are usable, rollout.remote.servers=2 are needed:\n.*ready"):
        fleet(2, wait_s=0.3).prepare(WEIGHTS)


def test_weights_that_are_not_finite_are_the_policys_fault_and_tried_nowhere_else(start, fleet):
    _, other = start(always("not_finite"), always("well"))
    with pytest.raises(FloatingPointError, match="not finite"):
        fleet(2).generate(make_call([1])[0])
    assert not other.asked


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


# ---------------------------------------------------------------- calls with different weights at a time

LATER = wire.Weights(wire.WeightsId(6, "6" * 64), "weights/v6-66666666/manifest.json")


def in_background(fleet: Fleet, call: Call) -> threading.Thread:
    number = fleet.queues.enter(call.weights.id)
    thread = threading.Thread(target=lambda: fleet.generate(call, number), daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.005)


def later(call: Call) -> Call:
    return Call(LATER, call.prompts, call.sampling, call.seeds, call.on_finish)


def test_a_server_takes_new_weights_when_it_has_ended_its_part_and_another_goes_on_with_the_old(start, fleet):
    """The later call is over while the earlier one still waits for its slowest server, whose part of it others took."""
    slow, quick = start(always("until 0"), always("well"))
    both = fleet(2, timeout_s=30)
    both.prepare(WEIGHTS)
    first, told, wanted = make_call([2] * 4)
    second, told_later, _ = make_call([2] * 4)
    earlier = in_background(both, first)
    wait_for(lambda: slow.asked and len(told) == 4)  # the quick one has ended its part
    in_background(both, later(second)).join(20)
    assert len(told_later) == 8
    assert (slow.weights, quick.weights) == (WEIGHTS.id, LATER.id)
    assert earlier.is_alive()
    slow.released.set()
    earlier.join(20)
    assert sorted(told) == sorted(wanted)
    assert slow.refits == [WEIGHTS]


def test_what_a_dead_server_leaves_of_an_earlier_call_is_drawn_with_its_weights_by_one_that_has_later_ones(
    start, fleet
):
    slow, quick = start(always("until 0"), always("well"))
    both = fleet(2, timeout_s=30)
    both.prepare(WEIGHTS)
    first, told, wanted = make_call([2] * 4)
    second, told_later, _ = make_call([2] * 4)
    earlier = in_background(both, first)
    wait_for(lambda: slow.asked and len(told) == 4)
    in_background(both, later(second)).join(20)
    slow.close()
    earlier.join(20)
    assert sorted(told) == sorted(wanted)
    assert len(told_later) == 8
    assert quick.refits == [WEIGHTS, LATER, WEIGHTS]


def test_a_server_that_always_has_other_weights_than_it_says_is_left_out(start, fleet):
    start(always("other"), always("well"))
    call, told, wanted = make_call([2] * 4)
    said = []
    fleet(2, log=said.append).generate(call)
    assert sorted(told) == sorted(wanted)
    assert len(said) == 1
    assert "10 times: HTTP 409: other weights" in said[0]


def test_a_server_in_the_midst_of_a_refit_is_asked_again_and_not_left_out(start, fleet):
    start(iter(["loading", "loading", "well"]).__next__)
    call, told, wanted = make_call([2] * 4)
    said = []
    fleet(1, log=said.append).generate(call)
    assert sorted(told) == sorted(wanted)
    assert not said


def test_requests_of_earlier_calls_go_first_and_calls_never_mix_at_a_server():
    """A thousand random schedules: every request gets its turn, and none waits for a later call."""
    for seed in range(1000):
        rng, queues = random.Random(seed), Queues()
        calls = [queues.enter(wire.WeightsId(version, "")) for version in (0, 0, 1, 2)]
        tickets = [queues.put(Ticket(rng.choice("ab"), rng.choice(calls), 1)) for _ in range(6)]
        ended: list[Ticket] = []
        while len(ended) < len(tickets):
            waiting = [ticket for ticket in tickets if ticket not in ended]
            rng.shuffle(waiting)
            running = [ticket for ticket in waiting if queues.run(ticket)]
            assert min(waiting, key=lambda ticket: ticket.call) in running
            for server in "ab":
                assert len({ticket.call for ticket in running if ticket.server == server}) <= 1
            ended.append(rng.choice(running))
            queues.done(ended[-1])


def test_what_is_batched_with_what_does_not_depend_on_who_is_busy(start, fleet):
    """The parts of a call are the same whether its servers are free or not; only who draws which part differs."""
    slow, quick = start(always("until 0"), always("well"))
    both = fleet(2, timeout_s=30)
    both.prepare(WEIGHTS)
    alone, busy = (make_call([2, 1, 3, 1])[0] for _ in range(2))
    earlier = in_background(both, alone)
    wait_for(lambda: slow.asked and quick.asked)
    later_one = in_background(both, later(busy))
    later_one.join(20)
    slow.released.set()
    earlier.join(20)

    def parts(version: int) -> list[list[list[int]]]:
        asked = [request for server in (slow, quick) for request in server.asked]
        return sorted(request.seeds for request in asked if request.weights.policy_version == version)

    assert parts(5) == parts(6)
