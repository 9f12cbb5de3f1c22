"""Whatever a check does, the others run and the report names it: hangs, crashes, late and lost ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_aapo.doctor import report
from nemo_aapo.doctor.finding import Check, Context, Finding, Place
from nemo_aapo.doctor.guard import run_guarded
from nemo_aapo.doctor.ranks import examine, place_of, slurm_environment
from nemo_aapo.errors import RunError
from nemo_aapo.launch.local import free_port

ROOT = Path(__file__).resolve().parents[2]


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.found: list[Finding] = []

    def begin(self, check: Check) -> None:
        self.begun.append(check.name)

    def report(self, finding: Finding) -> None:
        self.found.append(finding)


def examined(checks, place=None, **more) -> list[Finding]:
    listener = Listener()
    examine(checks, None, place or ALONE, listener, **more)
    return listener.found


ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, host="here")


def fine(context: Context) -> Finding:
    print("noise")
    return Finding("fine", "ok", "all is well")


def hangs(context: Context) -> Finding:
    print("waiting for", subprocess.Popen(["sleep", "600"]).pid, flush=True)
    time.sleep(600)


def crashes(context: Context) -> Finding:
    os.write(2, b"terminate called\n")
    os.abort()


def raises(context: Context) -> Finding:
    raise KeyError("what")


def refuses(context: Context) -> Finding:
    raise RunError("the disk is full\nfree some of it")


@pytest.mark.slow
def test_a_check_that_hangs_crashes_or_raises_costs_its_own_line(capfd):
    checks = [Check(f.__name__, f, 1.0 if f is hangs else 200.0) for f in (hangs, crashes, raises, refuses, fine)]
    found = examined(checks)
    late, dead, broken, refused, ok = found
    assert [finding.level for finding in found] == ["failure"] * 4 + ["ok"]
    assert late.text.startswith("not done after 1 s, and killed; its last words: waiting for ")
    child = late.text.split()[-1]
    assert not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()
    assert dead.text == "died by SIGABRT; its last words: terminate called"
    assert broken.text.startswith("broke off: KeyError: 'what' (")
    assert refused.text == "the disk is full; free some of it"
    assert ok.text == "all is well"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_check_that_builds_on_a_failed_one_is_skipped():
    checks = [Check("raises", raises, 20), Check("later", fine, 20, after=("raises",)), Check("fine", fine, 20)]
    found = examined([*checks, Check("run", fine, 20, needs_config=True)])
    assert [finding.level for finding in found] == ["failure", "skipped", "ok", "skipped"]
    assert found[1].text == "builds on raises, which failed"
    assert found[3].text == "needs a configuration: pass KEY=VALUE as to train.py"


# ---------------------------------------------------------------- several ranks


def all_reduce(context: Context) -> Finding:
    from nemo_aapo.doctor.checks.collectives import all_reduce

    return all_reduce(context)


def all_reduce_without_rank_1(context: Context) -> Finding:
    from nemo_aapo.doctor.checks import collectives

    if context.place.rank == 1:
        time.sleep(6.0)
    return collectives.all_reduce(context, wait_s=2.0)


def crashes_on_rank_1(context: Context) -> Finding:
    return crashes(context) if context.place.rank == 1 else Finding("crash", "ok", "not here")


def ends_rank_1(context: Context) -> Finding:
    if context.place.rank == 1:
        os.kill(os.getppid(), 9)
        time.sleep(60)
    return Finding("lost", "ok", "still here")


SCENARIO = (
    Check("all_reduce", all_reduce, 60, on="rank", together=True),
    Check("all_reduce", all_reduce_without_rank_1, 60, on="rank", together=True),
    Check("crash", crashes_on_rank_1, 20, on="rank"),
    Check("first", fine, 20),
    Check("lost", ends_rank_1, 2, on="rank"),
    Check("together", all_reduce, 60, on="rank", together=True),
    Check("alone", fine, 20),
)


def run_scenario() -> None:
    """One rank of the scenario; rank 0 prints what it found."""
    from nemo_aapo.doctor import ranks

    ranks.GRACE_S = 3.0
    place = place_of(os.environ)
    found = examined(SCENARIO, Place(**{**as_dict(place), "host": f"host{place.rank}"}), start_s=120)
    print(json.dumps([as_dict(finding) for finding in found]))


def as_dict(value) -> dict:
    from dataclasses import asdict

    return asdict(value)


@pytest.mark.slow
def test_late_broken_and_lost_ranks_are_named_and_the_rest_goes_on():
    command = [sys.executable, "-c", "from tests.doctor.test_doctor_ranks import run_scenario; run_scenario()"]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **job}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**base, "RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, text=True)
        for r in ("0", "1")
    ]
    try:
        output, _ = processes[0].communicate(timeout=240)
        assert processes[1].wait(120) == -9
    finally:
        for process in processes:
            process.kill()
    found = [(entry["level"], entry["text"]) for entry in json.loads(output.splitlines()[-1])]
    who, right, *late, crash, first, lost, together, alone = found
    assert who == ("ok", "2 ranks on host0, host1")
    assert right[1].startswith("the sums of 2 ranks are right; 64 MiB: gloo ")
    assert ("failure", "rank 0 on host0: rank 1 did not come within 2 s") in late
    assert [text.partition(":")[0] for _, text in late] == ["rank 0 on host0", "rank 1 on host1"]
    assert crash == ("failure", "rank 1 on host1: died by SIGABRT; its last words: terminate called")
    assert lost == ("failure", "rank 1 on host1: no answer within 5 s")
    assert together == ("skipped", "needs all ranks, and rank 1 on host1 did not answer")
    assert first[0] == alone[0] == "ok"


@pytest.fixture
def first_of_two(monkeypatch) -> Place:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return Place(rank=0, world_size=2, local_rank=0, local_world_size=2, host="here")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_and_the_machine_is_still_looked_at(first_of_two):
    checks = [Check("together", fine, 5, on="rank", together=True), Check("fine", fine, 20)]
    found = examined(checks, first_of_two, start_s=1)
    assert [finding.level for finding in found] == ["failure", "skipped", "ok"]
    assert found[0].text == "rank 1 of 2 did not come within 1 s; there are 1, on here"


@pytest.mark.slow
def test_a_taken_master_port_is_a_failure_and_other_ranks_do_not_wait_for_ever(first_of_two, monkeypatch):
    import socket

    with socket.create_server(("", int(os.environ["MASTER_PORT"]))):
        found = examined([Check("fine", fine, 20)], first_of_two, start_s=2)
    assert [finding.level for finding in found] == ["failure"]
    assert "can't listen on 127.0.0.1:" in found[0].text
    second = Place(rank=1, world_size=2, local_rank=1, local_world_size=2, host="there")
    with pytest.raises(RunError, match=r"on there: rank 0 is gone or does not answer"):
        examined([Check("fine", fine, 20)], second, start_s=1)


# ---------------------------------------------------------------- who is who, and the report


def test_ranks_are_known_by_torchruns_variables_and_by_those_of_plain_srun():
    assert place_of({}).world_size == 1
    step = {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_JOB_ID": "10", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "n[1-2]",
        "MASTER_ADDR": "10.0.0.1",
    }  # fmt: skip
    made = slurm_environment(step)
    assert (made["MASTER_ADDR"], made["MASTER_PORT"]) == ("10.0.0.1", "15072")
    place = place_of(made)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert slurm_environment({**step, "RANK": "3"}) == {}
    assert slurm_environment({**step, "SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_one_line_where_all_ranks_agree_and_one_for_each_thing_that_is_wrong():
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    ok, slow = Finding("disk", "ok", "80 GiB"), Finding("disk", "failure", "full", "free space")
    assert report.merge({rank: [ok] for rank in hosts}, hosts) == [ok]
    assert report.merge({rank: [slow] for rank in hosts}, hosts) == [slow]
    assert report.merge({0: [ok], 1: [ok], 2: [Finding("disk", "ok", "81 GiB")], 3: []}, hosts) == [ok]
    merged = report.merge({0: [ok], 1: [ok], 2: [slow], 3: [slow]}, hosts)
    assert merged == [Finding("disk", "failure", "ranks 2 on b, 3 on b: full", "free space")]


def test_the_report_counts_and_json_holds_the_same():
    findings = [Finding("a", "ok", "x"), Finding("b", "warning", "y", "do z"), Finding("c", "skipped", "w")]
    assert report.line(findings[1]).split() == ["warning", "b", "y.", "Remedy:", "do", "z"]
    assert report.summary(findings, 2.4) == "1 ok, 1 warning, 0 failure, 1 skipped; 2 s"
    as_json = json.loads(report.to_json(findings, ALONE, 2.4))
    assert as_json["ok"] is True
    assert as_json["findings"][1] == {"name": "b", "level": "warning", "text": "y", "remedy": "do z"}
    failed = [*findings, Finding("d", "failure", "v")]
    assert json.loads(report.to_json(failed, ALONE, 1.0))["ok"] is False


@pytest.mark.slow
def test_a_check_runs_where_it_is_needed():
    second_on_its_machine = Place(rank=3, world_size=4, local_rank=1, local_world_size=2, host="b")
    first_on_its_machine = Place(rank=2, world_size=4, local_rank=0, local_world_size=2, host="b")
    for on, wanted in {"first": (False, False), "node": (True, False), "rank": (True, True)}.items():
        check = Check("fine", fine, 1, on=on)
        assert (check.concerns(first_on_its_machine), check.concerns(second_on_its_machine)) == wanted
    assert run_guarded(Check("fine", fine, 20), Context(None, ALONE, 0, "t")) == [fine(None)]
