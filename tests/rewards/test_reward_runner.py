"""The reward runner: hostile input costs its own limit, is counted, and hurts no other item."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_aapo.errors import Interrupted, RewardError
from nemo_aapo.rewards import build_reward, reward_config
from nemo_aapo.rewards.workers import pool
from nemo_aapo.rewards.workers import runner as reward_runner
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.run import stop
from tests.rewards.judging import completion, prompt

LIMIT_S = 3.0
"""What a hostile item costs; the others take milliseconds, and must stay within it on a busy machine too."""
SLACK_S = 60.0
"""For a machine that is busy with other things; what is waited for here comes in a moment, or never."""

"""The last two: 10 MB."""


@pytest.fixture
def custom(tmp_path):
    """Makes a custom reward of a function's body; the file has the usual imports."""

    def make(body: str, name: str = "fn"):
        path = tmp_path / f"{name}.py"
        head = "import os, subprocess, sys, time\n\n\ndef {}(prompt, completion, answer, **info):\n"
        path.write_text(head.format(name) + textwrap.indent(textwrap.dedent(body), "    "))
        return build_reward({"name": "custom", "function": f"{path}:{name}"})

    return make


def running(pid: int) -> bool:
    """True unless the process is gone (or dead and waiting to be reaped by someone else)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


HOSTILE_CODE = {
    "while True: pass": "timeout",
    "time.sleep(1000)": "timeout",
    "return 7**7**7**7": "timeout",  # in C, where no signal and no other thread gets through
    "os._exit(0)": "error",
    "sys.exit(0)": "error",
    "os.kill(os.getpid(), 11)": "error",
    "raise KeyError(completion)": "error",
    "return len(bytearray(6 << 30))": "error",
    "return fn(prompt, completion, answer)": "error",
    "return float('nan')": "error",
    "return float('inf')": "error",
    "return None": "error",
    "return 'high'": "error",
    "os.closerange(0, 100); return 1.0": "error",
}


@pytest.mark.slow
def test_hostile_functions_cost_their_own_item_and_are_counted(custom):
    cases = "".join(f"if completion == {code!r}:\n    {code}\n" for code in HOSTILE_CODE)
    reward = custom(cases + "print('noise'); return len(completion) / 100")
    with RewardRunner([(reward, 2.0)], workers=2, timeout_s=LIMIT_S) as runner:
        for n, code in enumerate(HOSTILE_CODE):
            runner.submit(code, prompt(), code, completion())
            runner.submit(n, prompt(), "x" * n, completion())
        results = runner.collect()
    for n, (code, failure) in enumerate(HOSTILE_CODE.items()):
        assert results[code].failure == failure, (code, results[code])
        assert math.isnan(results[code].score)
        assert math.isnan(results[code].parts["fn"])
        assert (results[n].failure, results[n].score, results[n].parts) == (None, 2 * n / 100, {"fn": n / 100})
    assert list(results) == [key for n, code in enumerate(HOSTILE_CODE) for key in (code, n)]
    failures = list(HOSTILE_CODE.values())
    assert runner.stats.timeouts == failures.count("timeout")
    assert runner.stats.errors == failures.count("error")
    for code, detail in [
        ("raise KeyError(completion)", "KeyError"),
        ("raise KeyError(completion)", "fn.py:"),
        ("sys.exit(0)", "SystemExit"),
        ("os._exit(0)", "the worker died: exit status 0"),
        ("os.kill(os.getpid(), 11)", "the worker died: signal SIGSEGV"),
        ("return len(bytearray(6 << 30))", "MemoryError"),
        ("return float('nan')", "fn: ValueError: nan is not finite"),
    ]:
        assert detail in results[code].detail


@pytest.mark.slow
def test_results_do_not_depend_on_which_is_done_first_nor_on_the_number_of_workers(custom):
    reward = custom("time.sleep(int(completion) % 5 * 0.01); return int(completion) + info['num_tokens'] / 64")
    tables = []
    for workers in (1, 3):
        with RewardRunner([(reward, 1.0)], workers, timeout_s=30) as runner:
            for n in range(40):
                runner.submit(n, prompt(), str(n * 7 % 40), completion(n))
            tables.append([(index, result.score) for index, result in runner.collect().items()])
    assert tables[0] == tables[1] == [(n, n * 7 % 40 + n / 64) for n in range(40)]


@pytest.mark.slow
def test_cheap_rewards_score_the_same_in_process_and_in_a_worker():
    cosine = build_reward({"name": "cosine", "max_tokens": 50, "verifier": "integer"})
    cheap = [(build_reward({"name": name}), weight) for name, weight in (("integer", 1.0), ("format", 0.3))]
    rewards = [*cheap, (build_reward({"name": "exact"}), 0.0), (cosine, 0.7)]
    texts = ["72", "<think>72</think><answer>72</answer>", "71", "", "9" * 1_000_000, "1 2," * 250_000, "\ud800"]
    outcomes = []
    for workers in (0, 1):
        with RewardRunner(rewards, workers, timeout_s=30) as runner:
            for question in ("72", "7"):
                for n, text in enumerate(texts):
                    runner.submit((question, n), prompt(question), text, completion(n))
            outcomes.append(runner.collect())
            assert runner.stats.scored == 2 * len(texts)
            assert runner.stats.errors == runner.stats.timeouts == 0
    assert outcomes[0] == outcomes[1]
    for result in outcomes[0].values():
        assert list(result.parts) == ["integer", "format", "exact", "cosine"]
        total = sum(weight * result.parts[reward.name] for reward, weight in rewards)
        assert result.score == pytest.approx(total, rel=1e-12)
    assert outcomes[0]["72", 0].score == 1.0 + 0.7 * 1.0


def test_a_failure_in_process_costs_its_item_only():
    with RewardRunner([(build_reward({"name": "integer"}), 1.0)], 0, timeout_s=1) as runner:
        runner.submit("bad", prompt("not a number"), "7", completion())
        runner.submit("good", prompt("7"), "7", completion())
        results = runner.collect()
    assert results["bad"].failure == "error"
    assert math.isnan(results["bad"].score)
    assert results["good"].score == 1.0


@pytest.mark.slow
def test_submitting_does_not_wait_for_scores(custom, tmp_path):
    """The rewards wait for what comes after the submissions."""
    submitted = tmp_path / "submitted"
    reward = custom(f"while not os.path.exists({str(submitted)!r}): time.sleep(0.01)\nreturn 1.0")
    with RewardRunner([(reward, 1.0)], workers=1, timeout_s=600) as runner:
        for n in range(2):
            runner.submit(n, prompt(), "x" * 1_000_000, completion())
        submitted.touch()
        assert all(result.score == 1.0 for result in runner.collect().values())
        assert runner.collect() == {}


@pytest.mark.slow
def test_an_index_is_taken_until_it_is_collected_and_a_late_item_is_named(custom):
    with RewardRunner([(custom("time.sleep(float(completion)); return 1.0"), 1.0)], 1, timeout_s=60) as runner:
        runner.submit((0, 1), prompt(), "0", completion())
        with pytest.raises(ValueError, match=r"\(0, 1\) is submitted already"):
            runner.submit((0, 1), prompt(), "0", completion())
        runner.collect()
        runner.submit((0, 1), prompt(), "50", completion())
        with pytest.raises(TimeoutError, match=r"1 of 1 completions were not scored within 0\.2 s"):
            runner.collect(timeout_s=0.2)


@pytest.mark.slow
def test_those_that_wait_in_front_are_no_reason_to_give_up(custom, monkeypatch):
    """A deadline by the item that is asked for alone would pass while the nine before it are scored."""
    with RewardRunner([(custom("time.sleep(0.4); return 1.0"), 1.0)], 1, timeout_s=3) as runner:
        monkeypatch.setattr(reward_runner, "START_TIMEOUT_S", 0.5)
        for item in range(10):
            runner.submit(item, prompt(), "", completion())
        assert [result.score for result in runner.collect([9]).values()] == [1.0]


@pytest.mark.slow
def test_a_stop_breaks_off_the_waiting_for_scores(custom, monkeypatch):
    monkeypatch.setattr(stop, "PATIENCE_S", 0.1)
    with RewardRunner([(custom("time.sleep(1000)"), 1.0)], 1, timeout_s=1000) as runner, stop.StopSignal(speak=False):
        runner.submit(0, prompt(), "", completion())
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):  # it can be collected yet
            with pytest.raises(Interrupted, match="SIGTERM came while waiting for the rewards of 1 completions"):
                runner.collect()


@pytest.mark.slow
def test_a_worker_imports_no_torch_and_knows_what_the_completion_was(custom):
    body = """
        assert "torch" not in sys.modules
        assert (prompt, completion, answer) == ("How many?", "caf\\u00e9\\n\\ud800", "72")
        assert info == {"num_tokens": 5, "finish_reason": "length"}
        assert sys.stdin.read() == ""
        return True
    """
    with RewardRunner([(custom(body), 1.0)], workers=1, timeout_s=30) as runner:
        runner.submit(0, prompt(), "caf\u00e9\n\ud800", completion(5, "length"))
        result = runner.collect()[0]
    assert result.score == 1.0, result


@pytest.mark.slow
def test_a_worker_that_dies_between_items_or_gets_a_schedulers_signal_hurts_no_item(custom):
    with RewardRunner([(custom("time.sleep(0.3); return 1.0"), 1.0)], workers=1, timeout_s=30) as runner:
        (pid,) = runner.pool.pids
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not running(pid), SLACK_S)
        runner.submit("after a death", prompt(), "", completion())
        assert runner.collect()["after a death"].score == 1.0
        runner.submit("under signals", prompt(), "", completion())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(runner.pool.pids[0], number)
        assert runner.collect()["under signals"].score == 1.0


@pytest.mark.slow
def test_a_kill_takes_along_what_the_reward_started(custom, tmp_path):
    child = tmp_path / "pid"
    code = f"p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    with RewardRunner([(custom(code), 1.0)], workers=1, timeout_s=LIMIT_S) as runner:
        runner.submit(0, prompt(), "", completion())
        assert runner.collect()[0].failure == "timeout"
        assert wait_until(lambda: not running(int(child.read_text())), SLACK_S)


@pytest.mark.slow
def test_closing_kills_busy_workers_at_once(custom):
    runner = RewardRunner([(custom("while True: pass"), 1.0)], workers=2, timeout_s=600)
    pids = runner.pool.pids
    for n in range(5):
        runner.submit(n, prompt(), "", completion())
    start = time.monotonic()
    runner.close()
    runner.close()
    assert time.monotonic() - start < SLACK_S
    assert not any(running(pid) for pid in pids)
    assert runner.pool.pids == []
    with pytest.raises(RewardError, match="closed"):
        runner.submit(9, prompt(), "", completion())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_die_with_a_killed_parent_whatever_they_are_doing(custom, tmp_path):
    reward = custom("while completion == 'python': pass\nreturn 7**7**7**7 if completion == 'c' else 1.0")
    script = f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_reward_runner import build_reward, completion, prompt, RewardRunner
        runner = RewardRunner([(build_reward({reward_config(reward)!r}), 1.0)], workers=3, timeout_s={LIMIT_S})
        for text in ("python", "c"):
            runner.submit(text, prompt(), text, completion())
        print(*runner.pool.pids, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait(SLACK_S)
    parent.stdout.close()
    assert len(pids) == 3
    assert wait_until(lambda: not any(map(running, pids)), LIMIT_S + SLACK_S)


@pytest.mark.slow
def test_what_a_worker_cant_load_is_said_before_anything_is_scored(custom, monkeypatch):
    good = custom("return 1.0", name="score")
    path = good.function.removesuffix(":score")
    for function, message in [
        ("no_such_module_at_all:fn", "No module named 'no_such_module_at_all'"),
        (f"{path}:scor", "no function 'scor'; did you mean 'score'"),
        (f"{path}:os", "has no function 'os'"),
        ("os.path:basename", r"must be callable as fn\(prompt, completion, answer, \*\*info\)"),
    ]:
        reward = build_reward({"name": "custom", "function": function})
        with pytest.raises(RewardError, match=message):
            RewardRunner([(reward, 1.0)], workers=1, timeout_s=1)
    Path(path).write_text("import os\n\ndef score(:\n")
    with pytest.raises(RewardError, match=r"SyntaxError: .*score\.py:3"):
        RewardRunner([(good, 1.0)], workers=1, timeout_s=1)
    Path(path).write_text("import os\nos._exit(3)\n")
    with pytest.raises(RewardError, match=r"died at its start \(exit status 3\)"):
        RewardRunner([(good, 1.0)], workers=2, timeout_s=1)
    Path(path).write_text("while True: pass\n")
    monkeypatch.setattr(pool, "START_TIMEOUT_S", 1.0)
    with pytest.raises(RewardError, match="not ready after 1 s"):
        RewardRunner([(good, 1.0)], workers=1, timeout_s=1)


@pytest.mark.slow
def test_a_worker_that_cant_be_replaced_stops_the_run_instead_of_scoring_nothing(custom):
    reward = custom("os._exit(1)")
    with RewardRunner([(reward, 1.0)], workers=1, timeout_s=30) as runner:
        Path(reward.function.partition(":")[0]).write_text("raise ImportError('gone')")
        runner.submit(0, prompt(), "", completion())
        runner.submit(1, prompt(), "", completion())
        with pytest.raises(RewardError, match="gone"):
            runner.collect()


def test_impossible_arguments_are_refused():
    integer, accuracy = build_reward({"name": "integer"}), build_reward({"name": "accuracy"})
    slow_cosine = build_reward({"name": "cosine", "max_tokens": 9})
    for rewards, options, message in [
        ([], {}, "at least one reward"),
        ([(integer, 1.0), (integer, 2.0)], {}, "a name of its own"),
        ([(integer, math.inf)], {}, "must be finite"),
        ([(integer, 1.0)], {"workers": -1}, "workers must be at least 0"),
        ([(integer, 1.0)], {"timeout_s": 0}, "must be above 0"),
        ([(accuracy, 1.0), (slow_cosine, 1.0)], {}, "workers is 0, but accuracy, cosine may never end"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardRunner(rewards, **{"workers": 0, "timeout_s": 1.0, **options})
