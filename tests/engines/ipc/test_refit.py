"""Weights read in the trainer's memory by servers in other processes: proven, without files, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from nemo_aapo.config.compose import load_config
from tests.engines.servers.hosted import Engines, on_layout
from tests.servers import ROOT, Servers, wait_until_ready
from tests.training_runs import make_input, settings

pytestmark = pytest.mark.ranks  # the servers are ranks too

SHARED = Path("/dev/shm")
WAIT_S = 100
"""For servers that do not come, which nobody waits for who has lost one."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = make_input(tmp_path_factory.mktemp("ipc"))
    more = (
        "rollout.engine=remote",
        "rollout.refit=ipc",
        "rollout.remote.wait_s=60",
        "rollout.max_concurrent_tokens=2200",
    )
    return settings(folder, folder / "run", *more, "rollout.remote.servers=2")


@pytest.fixture(scope="module")
def directory(words):
    return Path(load_config(words).rollout.remote.directory)


@pytest.fixture(scope="module")
def servers(words, directory):
    """Server 0 under an interpreter of its own, as one of another environment would be; server 1 of two ranks."""
    forked, log = Servers(directory), directory.parent / "server_0.log"
    serve = [sys.executable, "scripts/serve.py", *words, "rollout.server.index=0"]
    with log.open("wb") as file:
        alone = subprocess.Popen(
            [*serve, f"rollout.server.directory={directory}"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        forked.start(1, [*words, "rollout.server.tensor_parallel_size=2"], ranks=2)
        end = time.monotonic() + 150
        while len(forked.records()) < 2:
            assert alone.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        for index in (0, 1):
            wait_until_ready(directory, index, 120)
        yield {0: alone.pid, 1: forked.processes[1].pid}
    finally:
        alone.kill()
        alone.wait(20)
        forked.close()


def held(pid: int) -> int:
    """Buckets that a process has open or mapped."""
    opened = sum("memfd:weights" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink())
    return opened + Path(f"/proc/{pid}/maps").read_text().count("memfd:weights")


def _through_refits(words):
    engines = Engines(words)
    engines.remote.sender.bucket_bytes = 20_000
    engines.assert_same()
    for version in (1, 2):
        engines.remote.sleep()
        engines.train(version)
        engines.remote.wake()
        engines.assert_same()
    sizes = {name: tensor.nbytes for name, tensor in engines.exported()}
    sent, folder = engines.remote.refit_bytes, Path(engines.remote.sender._door._folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    engines.remote.close()
    assert not folder.exists()
    return sent, sum(sizes.values()), held(os.getpid()), os.getpid(), engines.said


def test_servers_under_any_layout_have_each_version_from_memory_and_no_file_is_written(
    ranks, words, directory, servers
):
    ((sent, size, kept, pid, said),) = ranks.run(_through_refits, words, tp=None)
    assert (sent, said) == (size, [])
    assert kept == 0
    assert [held(pid) for pid in servers.values()] == [0, 0]
    assert not [*directory.glob("weights/*")]
    theirs = {str(pid), *map(str, servers.values())}  # in the names that torch gives what processes share
    assert not [path for path in SHARED.iterdir() if theirs & {*path.name.split("_")}]


def test_adapters_arrive_merged_from_tensor_parallel_ranks_as_they_do_by_files(ranks, words, servers):
    lora = "model.lora={rank: 4, alpha: 8, target_modules: [linear_qkv, linear_fc2]}"
    words = [*words, lora, "model.tensor_model_parallel_size=2", "trainer.devices=2"]
    one, other = ranks.run(on_layout, words, world=2, tp=2)
    by_files, _ = ranks.run(on_layout, [*words, "rollout.refit=files"], world=2, tp=2)
    assert one == other
    assert (one[0], one[2]) == (by_files[0], by_files[2])  # not in which order two servers have ended


def _among_faults(words, pid):
    """Refits in which server 0 is stopped, is well again, is killed: what was said, and seconds, of each; who is asked
    to sleep while it is stopped."""
    engines = Engines(words, "rollout.remote.timeout_s=20", f"rollout.remote.wait_s={WAIT_S}")
    engines.assert_same()  # both have come: from here on one is enough
    sender, fleet, found, asked = engines.remote.sender, engines.remote.fleet, [], []
    sender.bucket_bytes = 20_000
    hand_over, served = sender._door.hand_over, fleet.served
    for version, number in ((4, signal.SIGSTOP), (5, None), (6, signal.SIGKILL)):

        def interrupted(parts, descriptor, count, number=number):
            if count == 1 and number is not None:
                os.kill(pid, number)
            return hand_over(parts, descriptor, count)

        sender._door.hand_over = interrupted
        fleet._failed.clear()  # forgiven
        del engines.said[:]
        began = time.monotonic()
        engines.train(version)
        found.append((list(engines.said), time.monotonic() - began))
        if number == signal.SIGSTOP:
            with mock.patch.object(fleet, "served", lambda *of: (asked.append(of[1].index), served(*of))[1]):
                engines.remote.sleep()
            os.kill(pid, signal.SIGCONT)
        engines.assert_same()
    engines.remote.close()
    return found, asked, held(os.getpid())


def test_a_server_that_hangs_or_dies_in_mid_refit_is_left_out_holds_nobody_and_leaks_nothing(ranks, words, servers):
    """Last in the file: server 0 is gone afterwards."""
    ((found, asked, kept),) = ranks.run(_among_faults, words, servers[0], tp=None)
    (hung, hung_s), (well, _), (dead, dead_s) = found
    assert len(hung) == len(dead) == 1
    assert "rollout server 0 (http://127.0.0.1:" in hung[0]
    assert well == []
    assert max(hung_s, dead_s) < WAIT_S
    assert asked == [1]  # what is left out is not waited for again
    assert kept == 0
    assert held(servers[1]) == 0
