"""Ranks that are killed: the others end, say why, and the run goes on to the same bits as one that nobody disturbed."""

from __future__ import annotations

import re
import signal
import sys

import pytest

from nemo_aapo.launch.local import run_ranks
from tests import chaos as chaos_module
from tests.chaos import FULL_DISK, ROOT, Chaos, Kill, Layout

TWO = Layout(pp=2)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(tmp_path_factory.mktemp("chaos"))


def test_killed_while_it_saves(chaos):
    """First in the middle of its files, then when they are whole and lack their name."""
    lives = chaos.survive("save", TWO, [Kill("save", 2, rank=1), Kill("before rename", 1)])
    assert [life.codes.index(-signal.SIGKILL) for life in lives[:2]] == [1, 0]
    said = (chaos.folder / "save.log.0").read_text()
    assert re.search(r"rank 0 of 2 ended at (step 5, \w+|the checkpoint of step 4): another rank is gone", said)
    assert said.count("removing what an interrupted run left") == 2


def test_killed_where_two_ranks_decode_in_step_with_half_of_the_experts_each(tmp_path):
    """First in a rollout, in which the other one waits for its rows; then while the experts are saved."""
    chaos = Chaos(tmp_path, experts=True)
    lives = chaos.survive("experts", Layout(ep=2), [Kill("rollout", 30, rank=1), Kill("save", 1, rank=1)])
    assert [life.codes[1] for life in lives[:2]] == [-signal.SIGKILL] * 2
    assert lives[0].codes[0] > 0
    assert "another rank is gone" in (tmp_path / "experts.log.0").read_text()


def test_all_ranks_killed_in_a_rollout(chaos):
    """The stress script kills at moments of the wall clock too, which a busy machine can let pass."""
    [killed, _] = chaos.survive("all", TWO, [Kill("rollout", 7, everyone=True)])
    assert killed.codes == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(("ahead", "groups"), [(0, 14), (2, 22)])
def test_what_was_generated_before_a_kill_is_taken_up_again_and_the_run_ends_in_the_same_bits(chaos, ahead, groups):
    """Killed when the last checkpoint covers neither of two rollouts, of which one is whole and the other half done."""
    name, layout = f"bank_{ahead}", Layout(ahead=ahead)
    [killed, _] = chaos.survive(name, layout, [Kill("bank", groups)])
    assert killed.codes == [-signal.SIGKILL]
    assert (chaos.folder / f"{name}.log.0").read_text().count("taking up 4 of 4 groups of step") == 1
    assert not (chaos.folder / name / "bank").exists()


def test_a_rank_killed_in_the_backward_pass_is_named_and_the_launcher_ends_the_others(chaos, capfd, monkeypatch):
    """Fresh processes, started by the launcher; rank 0 waits in gloo for what rank 1 does not send."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_dir = chaos.folder / "backward"
    kill = Kill("backward", 9, rank=1)
    code = f"from {chaos_module.__name__} import *; sys.exit(run_rank({chaos.words(run_dir, TWO)!r}, {kill!r}))"
    command = [sys.executable, "-c", code]
    assert run_ranks(command, 2, run_dir / "logs", grace_s=200, fault_timeout_s=50) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "rank 1 of 2 was ended by SIGKILL" in said
    assert "did not end in time" not in said
    assert "rank 0 of 2 ended at step 3, train: another rank is gone" in said
    assert chaos.live(run_dir, TWO, None).codes == [0, 0]
    chaos.compare(run_dir, TWO)


def test_a_disk_that_is_full_for_a_while_ends_the_run_and_leaves_the_older_checkpoint(chaos):
    run_dir = chaos.folder / "full"
    assert chaos.live(run_dir, TWO, Kill(FULL_DISK, 2, rank=1)).codes == [1, 1]
    for rank in (0, 1):
        said = (chaos.folder / f"full.log.{rank}").read_text().splitlines()[-1]
        assert f"CheckpointError: the checkpoint of step 4 was not saved in {run_dir}/checkpoints" in said
        assert "rank 1: OSError: [Errno 27]" in said
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000002"]
    assert chaos.live(run_dir, TWO, None).codes == [0, 0]
    chaos.compare(run_dir, TWO)
