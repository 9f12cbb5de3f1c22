"""A job's steps: a rollout server that ends is started again in its place; who ends the attempt, and who does not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nemo_aapo.launch.slurm.rank import ADDRESSES, FIRST_PORT, PLACE, PORTS
from nemo_aapo.launch.slurm.roles import LONGEST_PAUSE_S, SETTLED_S, STARTS, Roles, Server, Step, server_steps

SRUN = ["srun", "--ntasks=2", "--relative={node}", "--", "python", "rollout.server.index={server}", "a={b}"]


def steps(addresses: str, servers: int) -> list[Step]:
    return server_steps(SRUN, list(addresses), servers, {"MASTER_PORT": str(FIRST_PORT + PORTS - 1)}, Path("/50%"))


@pytest.mark.parametrize(
    ("addresses", "servers", "places"),
    [
        ("ab", 2, [("0", "a", "0/1"), ("1", "b", "0/1")]),
        ("ab", 4, [("0", "a", "0/2"), ("0", "a", "1/2"), ("1", "b", "0/2"), ("1", "b", "1/2")]),
        ("abcd", 2, [("0", "a,b", "0/1"), ("2", "c,d", "0/1")]),
    ],
    ids=["one a node", "two a node", "two nodes each"],
)
def test_servers_fill_the_nodes_in_order_each_with_a_port_of_its_own(addresses, servers, places):
    found = steps(addresses, servers)
    for index, (step, (node, where, place)) in enumerate(zip(found, places, strict=True)):
        assert step.words == [
            "srun", f"--output=/50%%/server_{index}_rank_%t.log", "--ntasks=2", f"--relative={node}", "--", "python",
            f"rollout.server.index={index}", "a={b}",
        ]  # fmt: skip
        assert (step.environment[ADDRESSES.format(role="SERVERS")], step.environment[PLACE]) == (where, place)
    ports = [int(step.environment["MASTER_PORT"]) for step in found]
    assert len(set(ports)) == servers
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


def test_a_server_is_started_again_at_once_less_often_while_it_dies_soon_and_never_after_a_refusal():
    """Over a thousand random lives, with a clock of the test's own."""
    rng, (step, _) = random.Random(0), steps("a", 2)
    for _ in range(1_000):
        server, now, soon, ports = Server(step), 0.0, 0, set()
        while not server.given_up:
            assert server.is_due(now)
            ports.add(server.begin(now)["MASTER_PORT"])
            lived = rng.choice([0.0, 1.0, SETTLED_S - 0.5, SETTLED_S, 2.0**20])
            code = 2 if rng.random() < 0.01 else rng.choice([0, 1, 137])
            now += lived
            server.ended(now, code)
            soon = soon + 1 if lived < SETTLED_S else 1
            assert server.given_up == (code == 2 or soon == STARTS)
            pause = min(0.5 * 2 ** (soon - 1), LONGEST_PAUSE_S)
            assert not server.is_due(now + pause - 0.01)
            now += pause
        assert not server.is_due(now + 1e9)
        assert len(ports) == server.starts


def roles(folder: Path, server: str, train: str, min_servers: int = 1, servers: int = 1) -> Roles:
    """Shells in place of ``srun``."""

    def step(name: str, script: str) -> Step:
        return Step(name, ["bash", "-c", script], {**os.environ, "MASTER_PORT": "15000"}, f"{name}.log")

    names = [f"server_{n}" for n in range(servers)]
    return Roles(
        step("train", f"cd {folder}; {train}"),
        [step(name, f"cd {folder}; {server}") for name in names],
        folder,
        min_servers=min_servers,
        fault_timeout_s=5.0,
    )


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_until_the_trainer_has_ended(tmp_path, capfd):
    """The first one kills itself, the second one ends well, the third one stays."""
    lives = """echo $MASTER_PORT >> starts; case $(wc -l < starts) in
        1) echo "srun: error: node2: task 1: Killed" >&2; exit 137;;
        2) exit 0;;
        *) echo $$ > third; exec sleep 60;;
    esac"""
    ended = roles(tmp_path, lives, "until [[ -s third ]]; do sleep 0.1; done").wait(lambda: None)
    assert (ended.code, ended.lost_servers) == (0, "")
    assert capfd.readouterr().out.splitlines() == [
        f"rollout server 0 ended ({how}): it is started again in its place"
        for how in ("node2: task 1: Killed", "exit code 0")
    ]
    assert (tmp_path / "starts").read_text().split() == ["15000", "15001", "15002"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "third").read_text()), 0)


@pytest.mark.slow
def test_a_refused_server_ends_the_attempt_only_if_too_few_are_left(tmp_path, capfd):
    refused = "mkdir first 2>/dev/null && exit 2; exec sleep 60"
    two = roles(tmp_path, refused, "until [[ -e given_up ]]; do sleep 0.1; done", servers=2)
    enough = two.wait(lambda: any(s.given_up for s in two._servers) and (tmp_path / "given_up").touch())
    assert (enough.code, enough.lost_servers) == (0, "")
    (tmp_path / "first").rmdir()
    too_few = roles(tmp_path, refused, "exec sleep 60", servers=2, min_servers=2).wait(lambda: None)
    assert "1 rollout servers are left, rollout.remote.min_servers=2 are needed" in too_few.lost_servers
    assert capfd.readouterr().out.count("is given up") == 2
