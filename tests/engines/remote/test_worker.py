"""The server's one thread: what it runs together, what it never runs over, and how it stops."""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.engines.build import HostedEngine
from nemo_aapo.engines.remote.batch import Failure, Job
from nemo_aapo.engines.remote.wire import GenerateRequest, Weights, WeightsId
from nemo_aapo.engines.remote.worker import EngineWorker
from nemo_aapo.types import Completion, SamplingSpec

WARM, COLD = (SamplingSpec(temperature, 4, (1,)) for temperature in (1.0, 0.5))
V0, V1, V2 = (WeightsId(version, str(version)) for version in (0, 1, 2))


class Engine:
    """Notes what it is asked for; each completion waits for a permit."""

    def __init__(self) -> None:
        self.calls: list[list[int] | str] = []
        self.permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.version, self.logprobs = 0, np.zeros(1, np.float32)

    def generate(self, prompts, sampling, seeds, on_finish):
        self.calls.append([int(prompt[0]) for prompt in prompts])
        self.begun.release()
        for i, row in reversed(list(enumerate(seeds))):
            for j, seed in enumerate(row):
                assert self.permits.acquire(timeout=10)
                on_finish(i, j, Completion(prompts[i] + seed, self.logprobs, "stop", self.version))

    def wake(self): ...

    def sleep(self):
        self.calls.append("sleep")

    def close(self): ...


class Harness:
    def __init__(self, can_break_off: bool = True) -> None:
        self.engine, self.loaded = Engine(), []
        hosted = HostedEngine(self.engine, self.load, frozenset({"w"}), can_break_off)
        self.worker = EngineWorker(lambda: hosted, lambda: V0, self.locate)
        self.worker.built.result(10)

    @contextlib.contextmanager
    def locate(self, weights: Weights, tensors):
        assert tensors == {"w"}
        if weights.id == V2:
            raise OSError("gone")
        yield Path(str(weights.id.policy_version))

    def load(self, folder: Path, version: int) -> None:
        assert self.worker.weights is None  # while it loads, nothing is served
        self.loaded.append(str(folder))
        self.engine.version = version
        if len(self.loaded) > 1:
            raise ValueError("half-way")

    def ask(self, first: int, count: int = 1, sampling=WARM, weights=V0) -> tuple[Job, queue.Queue]:
        answers: queue.Queue = queue.Queue()
        prompts = [np.array([first + k], np.int32) for k in range(count)]
        job = Job(GenerateRequest(weights, sampling, prompts, [[0, 100]] * count), answers.put)
        self.worker.generate(job)
        return job, answers


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.engine.permits.release(1000)
    assert made.worker.stop(10)


def all_of(answers: queue.Queue):
    """(i, j, token, version) of the completions, and how it ended."""
    got = []
    while isinstance(answer := answers.get(timeout=10), tuple):
        i, j, completion = answer
        got.append((i, j, int(completion.token_ids[0]), completion.policy_version))
    return sorted(got), answer


def test_alike_requests_that_wait_run_as_one_batch_and_each_gets_its_own(harness):
    _, first = harness.ask(10)
    assert harness.engine.begun.acquire(timeout=10)
    asked = [harness.ask(20, 2)[1], harness.ask(30)[1], harness.ask(40, sampling=COLD)[1], harness.ask(50)[1]]
    assert harness.worker.outstanding == 2 + 4 + 2 + 2 + 2
    harness.engine.permits.release(1000)
    wanted = [(20, 2), (30, 1), (40, 1), (50, 1)]
    assert all_of(first)[1] is None
    for answers, (start, count) in zip(asked, wanted, strict=True):
        tokens = [(i, j, start + i + 100 * j, 0) for i in range(count) for j in range(2)]
        assert all_of(answers) == (tokens, None)
    assert harness.engine.calls == [[10], [20, 21, 30], [40], [50]]
    assert harness.worker.outstanding == 0


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_log_probs_that_no_message_can_hold_end_a_request_in_words(harness, number):
    harness.engine.logprobs = np.full(1, number, np.float32)
    harness.engine.permits.release(1000)
    assert all_of(harness.ask(10)[1]) == (
        [],
        Failure("not_finite", f"the engine gave log-probs that are not finite, by {V0}"),
    )
    assert harness.worker.outstanding == 0


def test_a_refit_waits_for_the_batch_before_it_and_nothing_overtakes_it(harness):
    _, before = harness.ask(10)
    assert harness.engine.begun.acquire(timeout=10)
    refit = harness.worker.load(Weights(V1, "m"))
    _, late = harness.ask(20)  # for the weights of before
    _, after = harness.ask(30, weights=V1)
    assert not refit.done()
    harness.engine.permits.release(1000)
    assert all_of(before) == ([(0, 0, 10, 0), (0, 1, 110, 0)], None)
    refit.result(10)
    completions, end = all_of(late)
    assert completions == []
    assert end.reason == "other_weights"
    assert all_of(after) == ([(0, 0, 30, 1), (0, 1, 130, 1)], None)


def test_weights_that_can_t_be_found_change_nothing_and_half_loaded_ones_are_never_served(harness):
    harness.engine.permits.release(1000)
    harness.worker.load(Weights(V1, "m")).result(10)
    harness.worker.load(Weights(V1, "m")).result(10)
    assert harness.loaded == ["1"]  # what it has is not loaded again
    with pytest.raises(OSError, match="gone"):
        harness.worker.load(Weights(V2, "m")).result(10)
    assert all_of(harness.ask(10, weights=V1)[1])[1] is None
    with pytest.raises(ValueError, match="half-way"):
        harness.worker.load(Weights(V0, None)).result(10)
    assert harness.worker.weights is None
    assert all_of(harness.ask(10, weights=V0)[1])[1].reason == "other_weights"


@pytest.mark.parametrize("can_break_off", [True, False])
def test_work_that_nobody_waits_for_is_broken_off_where_the_engine_can(can_break_off):
    harness = Harness(can_break_off)
    job, _ = harness.ask(10, 20)
    other, _ = harness.ask(60)
    assert harness.engine.begun.acquire(timeout=10)
    job.cancelled = other.cancelled = True
    harness.engine.permits.release(50)
    assert all_of(harness.ask(90)[1])[1] is None
    used = 50 - sum(harness.engine.permits.acquire(blocking=False) for _ in range(50))
    assert used == (1 + 2 if can_break_off else 42 + 2)
    assert harness.worker.outstanding == 0
    assert harness.worker.stop(10)


def test_stopping_ends_what_runs_at_its_next_completion_and_drops_what_waits():
    harness = Harness()
    _, running = harness.ask(10, 5)
    assert harness.engine.begun.acquire(timeout=10)
    _, waiting = harness.ask(20, sampling=COLD)
    refit = harness.worker.load(Weights(V1, "m"))
    assert not harness.worker.stop(0.0)
    harness.engine.permits.release()
    assert harness.worker.stop(10)
    completions, end = all_of(running)
    assert len(completions) == 1
    assert end == all_of(waiting)[1] == all_of(harness.ask(30)[1])[1] == Failure("stopping", "the server is stopping")
    assert refit.cancelled()


def test_a_sleep_waits_for_the_batch_before_it_and_the_next_one_goes_on(harness):
    _, first = harness.ask(1)
    assert harness.engine.begun.acquire(timeout=10)
    asleep = harness.worker.sleep()
    _, second = harness.ask(2)
    assert not asleep.done()
    harness.engine.permits.release(4)
    asleep.result(10)
    for answers in (first, second):
        assert [answers.get(timeout=10) for _ in range(3)][-1] is None
    assert harness.engine.calls == [[1], "sleep", [2]]
