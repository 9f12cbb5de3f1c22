"""Ranks on one machine: started alike, ended together, and a failure that names the rank and what it said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aapo.config import Config, parse
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.launch.local import launch, run_ranks
from nemo_aapo.launch.world import of_launcher

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def python(code: str) -> list[str]:
    """A rank that runs some lines of Python, quickly started."""
    return [sys.executable, "-S", "-c", textwrap.dedent(code)]


def make_config(run_dir: Path, *words: str) -> Config:
    """The page's settings but for these."""
    words = ("model.path=/m", "data.train=/t", "data.validation=/v", f"run.dir={run_dir}", *words)
    return parse(compose(read_command_line(list(words))))


def start_launcher(code: str, count: int, log_dir: Path, grace_s: float) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, as a shell starts it."""
    call = f"run_ranks({python(code)!r}, {count}, Path({str(log_dir)!r}), grace_s={grace_s}, fault_timeout_s=1)"
    script = f"from pathlib import Path\nfrom nemo_aapo.launch.local import run_ranks\nraise SystemExit({call})"
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_get_what_torchrun_sets_and_rank_0_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = python("import json, os; print(json.dumps(dict(os.environ)))")
    assert run_ranks(show, 3, tmp_path / "logs", grace_s=120, fault_timeout_s=5) == 0
    said = [capfd.readouterr().out] + [(tmp_path / f"logs/rank_{rank}.log").read_text() for rank in (1, 2)]
    environments = [json.loads(text.splitlines()[-1]) for text in said]
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "2"]
    for key, value in {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        assert {environment[key] for environment in environments} == {value}
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {str(threads)}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_ranks(show, 1, tmp_path / "logs", grace_s=120, fault_timeout_s=5) == 0
    assert json.loads(capfd.readouterr().out)["OMP_NUM_THREADS"] == "7"


def test_a_rank_that_fails_ends_the_others_and_is_named_with_its_last_words(tmp_path, capfd):
    code = f"""
        import os, signal, sys, time
        rank = os.environ["RANK"]
        if rank == "1":
            while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("ready")]) < 2:
                time.sleep(0.01)
            print("the last words of rank 1")
            sys.exit(7)
        def told(number, frame):
            open({str(tmp_path)!r} + "/told" + rank, "w")
            if rank == "0":
                sys.exit(3)
        signal.signal(signal.SIGTERM, told)
        open({str(tmp_path)!r} + "/ready" + rank, "w")
        time.sleep(600)  # rank 2 goes on after TERM, as one in a collective would
        time.sleep(600)
    """
    timeouts = ["trainer.distributed_timeout_s=600", "trainer.fault_timeout_s=3"]
    assert launch(make_config(tmp_path, "trainer.devices=3", *timeouts), python(code)) == 7
    assert (tmp_path / "told0").exists()
    assert (tmp_path / "told2").exists()
    said = capfd.readouterr().err
    assert "rank 1 of 3 ended with exit code 7" in said
    assert "rank_1.log" in said
    assert "the last words of rank 1" in said
    assert "rank 2: did not end in time after rank 1 failed; killed" in said


def test_a_rank_that_is_killed_gives_the_shells_exit_code(tmp_path, capfd):
    kill = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run_ranks(kill, 1, tmp_path / "logs", grace_s=120, fault_timeout_s=5) == 128 + signal.SIGKILL
    assert "was ended by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_a_killed_rank_is_named_rather_than_one_that_failed_for_want_of_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local, "POLL_S", 1.0)  # both have ended when the launcher looks
    code = f"""
        import os, signal, sys, time
        mine, other = {str(tmp_path)!r} + "/mine", {str(tmp_path)!r} + "/other"
        if os.environ["RANK"] == "1":
            open(mine, "w").write(str(os.getpid()))
            os.rename(mine, other)
            os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.exists(other):
            time.sleep(0.01)
        pid = open(other).read()
        while os.path.exists(f"/proc/{{pid}}/stat") and ") Z" not in open(f"/proc/{{pid}}/stat").read():
            time.sleep(0.01)
        sys.exit(3)
    """
    assert run_ranks(python(code), 2, tmp_path / "logs", grace_s=120, fault_timeout_s=5) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "rank 1 of 2 was ended by SIGKILL" in said
    assert "rank 0" not in said


def test_ctrl_c_reaches_every_rank_once_and_a_rank_that_ignores_it_is_killed_in_time(tmp_path):
    code = f"""
        import os, signal, time
        name = {str(tmp_path)!r} + "/" + os.environ["RANK"]
        count = 0
        def told(number, frame):
            global count
            count += 1
            open(name + ".count", "w").write(str(count))
        signal.signal(signal.SIGINT, told)
        open(name + ".ready", "w").close()
        while not count or os.environ["RANK"] == "1":
            time.sleep(0.02)
        time.sleep(0.3)
    """
    launcher = start_launcher(code, 2, tmp_path / "logs", grace_s=4)
    wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2, "ranks")
    os.killpg(launcher.pid, signal.SIGINT)  # what a terminal does
    said = launcher.communicate(timeout=120)[1]
    assert [(tmp_path / f"{rank}.count").read_text() for rank in (0, 1)] == ["1", "1"]
    assert "rank 1: did not end in time after SIGINT; killed" in said
    assert launcher.returncode == 128 + signal.SIGKILL


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(tmp_path):
    code = f"""
        import os, signal, time
        signal.signal(signal.SIGINT, lambda number, frame: open({str(tmp_path)!r} + "/told", "w").close())
        open({str(tmp_path)!r} + "/ready", "w").close()
        time.sleep(600)
        time.sleep(600)
    """
    launcher = start_launcher(code, 1, tmp_path / "logs", grace_s=600)
    wait_for((tmp_path / "ready").exists, "rank")
    launcher.send_signal(signal.SIGINT)
    wait_for((tmp_path / "told").exists, "first signal")
    launcher.send_signal(signal.SIGINT)
    assert "after the second SIGINT; killed" in launcher.communicate(timeout=120)[1]


def test_ranks_that_save_and_end_after_term_make_a_good_end(tmp_path):
    code = f"""
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        open({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".ready", "w").close()
        time.sleep(600)
    """
    launcher = start_launcher(code, 2, tmp_path / "logs", grace_s=120)
    wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2, "ranks")
    launcher.terminate()
    assert launcher.communicate(timeout=120)[1] == ""
    assert launcher.returncode == 0


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path):
    code = f"""
        import os, time
        partial = {str(tmp_path)!r} + "/" + os.environ["RANK"]
        open(partial, "w").write(str(os.getpid()))
        os.rename(partial, partial + ".pid")
        time.sleep(600)
    """
    launcher = start_launcher(code, 2, tmp_path / "logs", grace_s=120)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "ranks")
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert all(alive(pid) for pid in pids)
    launcher.kill()
    launcher.communicate(timeout=120)
    wait_for(lambda: not any(alive(pid) for pid in pids), "end of the ranks")


def test_what_a_rank_leaves_behind_goes_with_it(tmp_path):
    code = f"""
        import os, time
        child = os.fork()
        if child:
            open({str(tmp_path / "worker")!r}, "w").write(str(child))
        else:
            time.sleep(600)
    """
    assert run_ranks(python(code), 1, tmp_path / "logs", grace_s=120, fault_timeout_s=5) == 0
    worker = int((tmp_path / "worker").read_text())
    wait_for(lambda: not alive(worker), "end of the worker")


def test_more_than_one_node_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: .* this machine only"):
        of_launcher(make_config(tmp_path, "trainer.num_nodes=2"))


def test_a_rank_that_hangs_after_the_others_ended_is_killed_in_time(tmp_path, capfd):
    hang = python("import os, time; time.sleep(600 * int(os.environ['RANK']))")
    assert run_ranks(hang, 2, tmp_path / "logs", grace_s=0.5, fault_timeout_s=5) == 128 + signal.SIGKILL
    assert "rank 1: did not end in time after another rank ended; killed" in capfd.readouterr().err
