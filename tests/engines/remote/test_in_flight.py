"""A server's batch in flight: what joins it, what waits, which weights each token is said to be of."""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.engines.build import HostedEngine
from nemo_aapo.engines.messages import load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.engines.remote.batch import Job
from nemo_aapo.engines.remote.wire import GenerateRequest, Weights, WeightsId
from nemo_aapo.engines.remote.worker import EngineWorker
from nemo_aapo.errors import OtherWeightsError, WireError
from nemo_aapo.types import Completion, SamplingSpec

SPEC, OTHER = (SamplingSpec(temperature, 9, (1,)) for temperature in (1.0, 0.5))
V0, V1, V2 = (WeightsId(version, str(version) * 8) for version in (0, 1, 2))


class Engine:
    """Makes a token of each sequence, which has as many as its seed says, once it is allowed a step."""

    shares_weights, stats, refit_bytes = False, None, 0

    def __init__(self) -> None:
        self.version, self.steps = 0, threading.Semaphore(0)
        self.calls, self.recomputes, self.step_done = 0, [], threading.Semaphore(0)

    def generate_in_flight(self, prompts, sampling, seeds, on_finish, in_flight):
        self.calls += 1
        self.recomputes.append(in_flight.recompute_kv)
        live, count, more = [], 0, (prompts, seeds)
        while True:
            live += [(i, j, seed, []) for i, row in enumerate(more[1], count) for j, seed in enumerate(row)]
            count += len(more[1])
            if not live:
                return
            assert self.steps.acquire(timeout=10)
            for i, j, seed, versions in list(live):
                versions.append(self.version)
                if len(versions) == seed:
                    live.remove((i, j, seed, versions))
                    of_tokens = np.array(versions, np.int32) if versions[0] != versions[-1] else None
                    tokens, logprobs = np.full(seed, i, np.int32), np.zeros(seed, np.float32)
                    on_finish(i, j, Completion(tokens, logprobs, "stop", versions[0], versions=of_tokens))
            self.step_done.release()
            if (asked := in_flight.between()) is None:
                return
            more = asked

    def generate(self, prompts, sampling, seeds, on_finish):
        on_finish(0, 0, Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", self.version))

    def update_weights(self, named_tensors, version): ...

    def wake(self): ...

    def sleep(self): ...

    def close(self): ...


class Harness:
    def __init__(self) -> None:
        self.engine = Engine()
        hosted = HostedEngine(self.engine, self.load, frozenset(), True, prompt_tokens=3)
        self.worker = EngineWorker(lambda: hosted, lambda: V0, self.locate)
        self.worker.built.result(10)

    @contextlib.contextmanager
    def locate(self, weights, tensors):
        yield Path(str(weights.id.policy_version))

    def load(self, folder, version):
        if version == 9:
            raise ValueError("half-way")
        self.engine.version = version

    def ask(self, *rows, weights=V0, refit="keeps_kv", sampling=SPEC, prompt=2):
        answers: queue.Queue = queue.Queue()
        prompts = [np.arange(prompt, dtype=np.int32)] * len(rows)
        job = Job(GenerateRequest(weights, sampling, prompts, rows, refit), answers.put)
        self.worker.generate(job)
        return job, answers

    def step(self, count=1):
        for _ in range(count):
            self.engine.steps.release()
            assert self.engine.step_done.acquire(timeout=10)


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.engine.steps.release(1000)
    assert made.worker.stop(10)


def versions_of(answers):
    """(i, j, version of each token) of the completions up to the end, and the end."""
    got = []
    while isinstance(answer := answers.get(timeout=10), tuple):
        i, j, completion = answer
        got.append((i, j, completion.token_versions.tolist()))
    return got, answer


def test_weights_and_requests_are_taken_up_between_two_tokens_and_each_request_ends_with_its_own_last(harness):
    _, first = harness.ask([2, 5])
    harness.step()
    harness.worker.load(Weights(V1, "m"))
    harness.step()
    _, second = harness.ask([1], weights=V1)  # joins after the next step
    harness.step()
    harness.worker.load(Weights(V2, "m"))
    harness.step()
    assert versions_of(second) == ([(0, 0, [1])], None)  # its end did not wait for the other's
    harness.step()
    assert versions_of(first) == ([(0, 0, [0, 0]), (0, 1, [0, 0, 1, 1, 2])], None)
    assert harness.engine.calls == 1
    assert harness.worker.outstanding == 0
    assert harness.worker.served == {0: V0.digest, 1: V1.digest, 2: V2.digest}


def test_a_request_that_has_ended_is_forgotten_while_others_go_on(harness):
    harness.ask([9])
    harness.step()
    job, answers = harness.ask([1])
    harness.step(2)
    assert versions_of(answers)[1] is None
    ended = weakref.ref(job)
    del job
    harness.step()  # nothing of the step before is held any more
    gc.collect()
    assert ended() is None


def test_what_is_not_like_it_or_too_long_waits_for_its_end_and_what_asks_for_other_weights_is_told(harness):
    _, first = harness.ask([4])
    harness.step()
    _, stale = harness.ask([1], weights=V1)
    harness.step()
    assert stale.get(timeout=10).reason == "other_weights"
    others = [harness.ask([1], sampling=OTHER)[1], harness.ask([1], prompt=4)[1], harness.ask([1], refit="waits")[1]]
    harness.engine.steps.release(100)
    assert versions_of(first) == ([(0, 0, [0] * 4)], None)
    assert [versions_of(other) for other in others] == [([(0, 0, [0])], None)] * 3
    assert harness.engine.calls == 3  # and one in order


def test_weights_older_than_those_served_are_refused_and_half_loaded_ones_end_the_batch(harness):
    _, answers = harness.ask([8], refit="recomputes_kv")
    newer, older = harness.worker.load(Weights(V2, "m")), harness.worker.load(Weights(V1, "m"))
    harness.step()
    newer.result(10)
    with pytest.raises(OtherWeightsError, match=r"policy version 2 .* are newer than policy version 1"):
        older.result(10)
    broken = harness.worker.load(Weights(WeightsId(9, "9" * 8), "m"))
    harness.step()
    with pytest.raises(ValueError, match="half-way"):
        broken.result(10)
    got, end = versions_of(answers)
    assert (got, end.reason) == ([], "engine")
    assert harness.worker.weights is None
    assert harness.engine.recomputes == [True]
    assert harness.worker.outstanding == 0


def test_a_batch_that_nobody_waits_for_ends_between_two_tokens(harness):
    job, _ = harness.ask([1000])
    harness.step()
    job.cancelled = True
    harness.step()
    _, after = harness.ask([1])
    harness.step()
    assert versions_of(after) == ([(0, 0, [0])], None)
    assert harness.engine.calls == 2


# ---------------------------------------------------------------- the wire


def sent(versions):
    """A completion's message as a server sends it."""
    served = {3: "33", 4: "44", 5: "55"}
    mixed = np.array(versions, np.int32)
    completion = Completion(
        np.arange(len(mixed), dtype=np.int32), np.zeros(len(mixed), np.float32), "stop", versions[0], versions=mixed
    )
    return load_object(wire.encode_completion(0, 1, completion, served=served))


def test_versions_cross_the_wire_token_by_token():
    message = sent([3, 3, 5, 5, 5])
    assert message["versions"] == [[3, "33", 2], [5, "55", 3]]
    _, _, got = wire.decode_completion(message, served={3: "33", 5: "55"})
    assert (got.policy_version, got.versions.tolist()) == (3, [3, 3, 5, 5, 5])
    assert got.versions.dtype == np.int32
    _, _, plain = wire.decode_completion(sent([4, 4]), served={4: "44"})
    assert (plain.policy_version, plain.versions) == (4, None)


@pytest.mark.parametrize(
    ("versions", "served"),
    [
        ([[3, "33", 2], [5, "55", 3]], {3: "33", 5: "00"}),  # weights of another trainer, or of another start
        ([[3, "33", 2], [5, "55", 3]], {3: "33"}),
        ([[5, "55", 2], [3, "33", 3]], {3: "33", 5: "55"}),  # back again
        ([[3, "33", 2], [5, "55", 2]], {3: "33", 5: "55"}),  # not all tokens
        ([[5, "55", 5]], {5: "55"}),  # the first token is said to be of another
        ([[3, "33", -2], [5, "55", 7]], {3: "33", 5: "55"}),
        ([[3, "33"]], {3: "33"}),
        ("5", {5: "55"}),
        (None, {3: "33"}),
    ],
)
def test_versions_that_can_t_be_are_refused(versions, served):
    message = {**sent([3, 3, 5, 5, 5]), "versions": versions}
    if versions is None:
        del message["versions"]
    with pytest.raises(WireError, match=r"versions|of no use here"):
        wire.decode_completion(message, served=served)


def test_in_order_nobody_asked_for_several_versions():
    with pytest.raises(WireError, match="if, and only if, the request let weights change"):
        wire.decode_completion(sent([3, 3, 5]))
