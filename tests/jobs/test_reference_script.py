"""scripts/reference_rewards.py refuses before torch is imported, and starts ranks where it should."""

from __future__ import annotations

import pytest

from nemo_aapo.cli import fill as script
from nemo_aapo.launch import local
from tests.scripts import exit_code_and_heavy_imports
from tests.tiny_models import save_empty_input


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The settings without a default, and a model directory without tensors."""
    return save_empty_input(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3", "--shards", "3"], "--shard must lie between 0 and 2"),
        (["--shard=-1", "--shards=3"], "--shard must lie between 0 and 2"),
        (["--shard", "1"], "--shard I and --shards N go together"),
        (["--shards", "x", "--shard", "1"], "argument --shards: invalid int value"),
        (["--merge", "--status"], "one at a time"),
        (["--merge", "--shard", "0", "--shards", "2"], "one at a time"),
        (["--shrad", "0"], "--shrad"),
        (["algorithm=gpg"], "algorithm.reference=null: only cached reference rewards are stored"),
        (["algorithm=aapo_paper"], "algorithm.reference=online: only cached"),
        (["model.path=nowhere"], "model.path=nowhere: no such directory"),
        (["algorithm.reference_stor=x"], "did you mean 'algorithm.reference_store'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(words, capsys, options, message):
    assert script.main([*words, *options]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


@pytest.mark.slow
def test_a_refusal_comes_before_torch_is_imported(words):
    assert exit_code_and_heavy_imports("reference_rewards", [*words, "algorithm=gpg"]) == "2 []"


def test_help_names_the_options_and_the_settings(capsys):
    assert script.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--shard I --shards N", "--merge", "--status", "model.path="))


def test_several_devices_are_started_as_ranks_of_the_same_command_unless_this_is_one(words, monkeypatch):
    started = []
    monkeypatch.setattr(local, "run_ranks", lambda *what, **limits: started.append(what) or 7)
    argv = [*words, "--shard", "1", "--shards", "4", "trainer.devices=2"]
    monkeypatch.delenv("RANK", raising=False)
    assert script.main(argv) == 7
    ((command, count, logs),) = started
    assert (command[1:], count, logs.name) == (["-m", "nemo_aapo.cli", "fill", *argv], 2, "reference_rewards_1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert script.main(argv) == 2  # as a rank: four were started, not two
