"""Whose score is whose, whatever processes a reward starts; and what a reward's file may hold and import."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

import pytest

from nemo_aapo.errors import RewardError
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.base import score_parts
from nemo_aapo.rewards.workers import pool
from nemo_aapo.rewards.workers.runner import RewardRunner
from tests.rewards.judging import completion, prompt

pytestmark = pytest.mark.slow
LIMIT_S = 60.0
"""For a machine that is busy with other things."""


@dataclasses.dataclass
class Constant:
    """A reward that always says the same."""

    name: str
    value: Any
    in_process = True

    def __call__(self, *_):
        return self.value


def reward_file(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return build_reward({"name": "custom", "function": f"{path}:score"})


def scores(reward, texts, workers=1, timeout_s=LIMIT_S):
    with RewardRunner([(reward, 1.0)], workers, timeout_s) as runner:
        for n, text in enumerate(texts):
            runner.submit(n, prompt(), text, completion())
        return list(runner.collect().values())


FORKS = """
    import ctypes, multiprocessing, os, signal, subprocess, sys, threading, time

    def fork(in_child, how=os.fork):
        child = how()
        if child == 0:
            time.sleep(0.02)
            in_child()
        return child

    def boom():
        raise KeyError("of the child")

    def score(prompt, completion, answer, **info):
        value = float(completion)
        kind = int(value) % 8
        if kind == 0:
            fork(boom)                              # comes back by an error
        elif kind == 1:
            if os.fork() == 0:
                return -1.0                         # comes back by a score of its own
        elif kind == 2:
            fork(sys.exit)
        elif kind == 3:
            fork(boom, ctypes.PyDLL(None).fork)     # of which Python is not told
        elif kind == 4:
            fork(lambda: (os.setsid(), time.sleep(3)))  # outlives the worker, with all that it inherited
        elif kind == 5:
            print("{}", flush=True), os.write(1, b'{"number": 1, "parts": [9.0]}\\n')
            threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        elif kind == 6:
            with multiprocessing.get_context("fork").Pool(2) as processes:
                assert processes.map(abs, [-1, -2]) == [1, 2]   # ended by SIGTERM
        else:
            subprocess.Popen(["sleep", "3"])
        return value
"""


def test_whatever_processes_a_reward_starts_each_completion_gets_its_own_score(tmp_path):
    reward = reward_file(tmp_path / "forking.py", FORKS)
    texts = [str(n * 5 % 32) for n in range(32)]
    results = scores(reward, texts, workers=2)
    assert [(result.failure, result.score) for result in results] == [(None, float(text)) for text in texts]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"number": 1, "parts": [9.0], "detail": ""}\n', "another item's reply"),
        (b"noise\n", "no reply"),
        (b"[9.0]\n", "no reply"),
        (b"9.0\n\n", "no reply"),
    ],
)
def test_what_stands_in_the_channel_besides_the_reply_is_an_error_and_never_the_next_ones_reply(
    tmp_path, line, problem
):
    reward = reward_file(
        tmp_path / "stray.py",
        f"""
        import os, stat

        def score(prompt, completion, answer, **info):
            if completion == "1":
                for fd in range(3, 50):
                    if os.path.exists(f"/proc/self/fd/{{fd}}") and stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, {line!r})
                raise KeyError
            return float(completion)
        """,
    )
    results = scores(reward, [str(n) for n in range(6)])
    wrong = [n for n, result in enumerate(results) if result.failure]
    assert 1 in wrong
    assert set(wrong) <= {1, 2}  # the line that was read for a reply, and the reply that stood behind it
    assert problem in results[wrong[0]].detail + results[wrong[-1]].detail
    assert all(result.score == n for n, result in enumerate(results) if n not in wrong)


def test_a_message_quotes_what_a_worker_wrote_before_it_died(tmp_path, capfd, monkeypatch):
    died = "import os, sys\nprint('cannot reach the licence server')\n"
    reward = reward_file(tmp_path / "dies.py", died + "def score(*a, **i):\n    print('bye'); os._exit(3)\n")
    (result,) = scores(reward, ["7"])
    assert "the worker died: exit status 3; it wrote last: cannot reach the licence server; bye" in result.detail
    assert "bye" in capfd.readouterr().err
    reward = reward_file(tmp_path / "hangs.py", died + "sys.stdout.flush()\nwhile True: pass\n")
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 10.0)
    with pytest.raises(RewardError, match="not ready after 10 s; it wrote last: cannot reach the licence server"):
        RewardRunner([(reward, 1.0)], 1, LIMIT_S)


# ---------------------------------------------------------------- several rewards


def test_a_reward_that_fails_fails_the_sum_and_leaves_the_others_their_values():
    for weights, score in (((1.0, 0.5, 0.0), math.nan), ((0.0, 0.5, 1.0), 4.0)):
        rewards = [Constant("a", math.nan), Constant("b", 2.0), Constant("c", 3.0)]
        with RewardRunner(list(zip(rewards, weights, strict=True)), 0, 1.0) as runner:
            runner.submit(0, prompt(), "", completion())
            (result,) = runner.collect().values()
        assert math.isnan(result.parts["a"])
        assert (result.parts["b"], result.parts["c"]) == (2.0, 3.0)
        assert (result.score, result.failure) == (pytest.approx(score, nan_ok=True), "error" if weights[0] else None)
        assert result.detail.startswith("a: ValueError: nan is not finite")  # what has no weight only reports


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, "high", 1j, 10**400, [1.0, 2.0]])
def test_only_a_finite_number_is_a_value(value):
    parts, problem = score_parts([Constant("odd", value)], prompt(), "", completion())
    assert parts == [None]
    assert problem.startswith("odd: ")


# ---------------------------------------------------------------- files of rewards


MINE = """
    from __future__ import annotations

    import concurrent.futures, copy, dataclasses, functools, multiprocessing, pickle
    from typing import ClassVar, NamedTuple

    import neighbour

    @dataclasses.dataclass(frozen=True)
    class Weights:
        kind: ClassVar[str] = "mine"
        right: float = 1.0
        wrong: dict[str, float] = dataclasses.field(default_factory=dict)

    class Point(NamedTuple):
        x: float

    def double(weights):
        return 2 * weights.right

    def score(prompt, completion, answer, **info):
        assert pickle.loads(pickle.dumps(Weights(3.0))) == copy.deepcopy(Weights(3.0))
        assert pickle.loads(pickle.dumps([Point(1.0), double])) == [Point(1.0), double]
        if completion == "spawn":
            with multiprocessing.get_context("spawn").Pool(1) as processes:
                return processes.map(double, [Weights(4.0)])[0]
        if completion == "executor":
            with concurrent.futures.ProcessPoolExecutor(1) as processes:
                return processes.submit(double, Weights(5.0)).result()
        return neighbour.ONE + Weights().right
"""


def test_a_rewards_file_is_a_module_like_any_other(tmp_path, monkeypatch):
    """A dataclass with postponed annotations, pickle, spawned processes, and a file beside it."""
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    for name in ("my_reward.py", "json.py", "my-reward.v2.py"):  # the last two can't be imported by their names
        reward = reward_file(tmp_path / name, MINE)
        texts = ["", "executor", "spawn"] if name == "my_reward.py" else ["", "executor"]
        results = scores(reward, texts)
        assert [result.score for result in results] == [2.0, 10.0, 8.0][: len(texts)], results
        (tmp_path / name).unlink()
    monkeypatch.chdir(tmp_path)
    reward_file(tmp_path / "here.py", MINE)
    assert scores(build_reward({"name": "custom", "function": "here.py:score"}), ["spawn"])[0].score == 8.0


def test_files_of_one_name_in_two_folders_do_not_meet(tmp_path):
    rewards = []
    for n in (1, 2):
        body = f"N = {n}\n\ndef score{n}(prompt, completion, answer, **info):\n    return N\n"
        reward_file(tmp_path / str(n) / "mine.py", body)
        rewards.append((build_reward({"name": "custom", "function": f"{tmp_path / str(n)}/mine.py:score{n}"}), 1.0))
    with RewardRunner(rewards, 1, LIMIT_S) as runner:
        runner.submit(0, prompt(), "", completion())
        assert runner.collect()[0].parts == {"score1": 1.0, "score2": 2.0}


@pytest.mark.parametrize("line", ["import no_such_neighbour", "from . import neighbour", "from .neighbour import ONE"])
def test_an_import_that_fails_names_what_can_be_imported(tmp_path, line):
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    reward = reward_file(tmp_path / "mine.py", f"{line}\n\ndef score(*a, **i):\n    return 1.0\n")
    with pytest.raises(RewardError, match=r"mine\.py can import what lies beside it, by absolute imports") as raised:
        RewardRunner([(reward, 1.0)], 1, LIMIT_S)
    assert "mine.py:1)" in str(raised.value)
