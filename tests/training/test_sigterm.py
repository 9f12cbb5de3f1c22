"""A real SIGTERM into a process that is at something long: it is broken off, and nothing of it is half there."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from nemo_aapo.launch.local import free_port, rank_environments
from tests.forked import forking
from tests.training_runs import Parity, make_input, metrics, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXPORT = "exporting the Hugging Face model"
PAUSE_S = 0.5
"""Of what is made slow: each completion that is scored, each tensor that is exported."""
OTHERS = "waiting for others"
ENDS_S = 30.0
"""Within this a process that was told to stop ends, also on a busy machine; whole, each phase takes longer."""


class SlowIn(Parity):
    """Scores slowly in one phase of the run."""

    def __init__(self, run_dir: Path, phase: str) -> None:
        super().__init__()
        self.file, self.phase = run_dir / "phase.json", phase

    def __call__(self, prompt, text, completion):
        if self.file.exists() and json.loads(self.file.read_text())["phase"] == self.phase:
            time.sleep(PAUSE_S)
        return super().__call__(prompt, text, completion)


def live(environment: dict[str, str], words: list[str], slow: str, log: str) -> None:
    """One start of a run, in a process that was forked for it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    from nemo_aapo import RewardRunner, load_config, train
    from nemo_aapo.jobs import train as job
    from nemo_aapo.mcore.bridge import weights
    from nemo_aapo.run import stop

    stop.PATIENCE_S = PAUSE_S
    if slow == OTHERS:
        sys.exit(train(load_config(words)))
    if slow == EXPORT:
        job.SHORT_EXPORT_S, weights.TENSORS_BETWEEN_QUESTIONS = 0.0, 1
        export = weights.WeightMap.export
        weights.WeightMap.export = lambda *given: (time.sleep(PAUSE_S) or item for item in export(*given))
    config = load_config(words)
    sys.exit(train(config, rewards=RewardRunner([(SlowIn(Path(config.run.dir), slow), 1.0)], 0, 10.0)))


def begin(words: list[str], slow: str, log: Path):
    context = forking()
    (environment,) = rank_environments({}, 1, free_port())
    process = context.Process(target=live, args=(environment, words, slow, str(log)), daemon=True)
    process.start()
    return process


def test_a_step_that_waits_for_servers_or_for_rewards_ends_soon_after_a_sigterm(tmp_path):
    folder, log = make_input(tmp_path), tmp_path / "log"
    (folder / "slow.py").write_text(
        "import pathlib, time\n\n\ndef slow(prompt, completion, answer, **info):\n"
        f"    pathlib.Path({str(folder / 'scoring')!r}).touch()\n    time.sleep(1000)\n"
    )
    more = (
        "algorithm=gpg",
        "trainer.val_check_interval=0",
        f"rewards=[{{name: custom, function: {folder}/slow.py:slow}}]",
    )
    more = (*more, "validation.reward=slow", "reward_runner.timeout_s=1000", "reward_runner.workers=1")
    remote = ("rollout.engine=remote", f"rollout.remote.directory={folder}/fleet", "rollout.remote.wait_s=1000")
    runs = {
        begin(settings(folder, folder / name, *more, *other), OTHERS, log): (name, reached)
        for name, other, reached in (("rewards", (), folder / "scoring"), ("servers", remote, folder / "fleet"))
    }
    deadline = time.monotonic() + 120
    for process, (_, reached) in runs.items():
        while not reached.exists():
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    for process, (name, _) in runs.items():
        process.terminate()
        process.join(ENDS_S)
        assert process.exitcode == 0, log.read_text()
        assert not metrics(folder / name)
    assert log.read_text().count("stopped after step 0; the same command goes on from there") == 2


def test_a_validation_a_filling_and_an_export_end_soon_after_a_sigterm_and_are_made_up_for(tmp_path):
    folder = make_input(tmp_path)
    run_dir, log = folder / "run", folder / "log"
    more = ("trainer.max_steps=1", "algorithm=aapo", "validation.samples=9", "algorithm.reference_samples=8")
    words = settings(folder, run_dir, *more, "rollout.max_concurrent_tokens=48")  # two sequences at a time

    def start(slow: str = ""):
        return begin(words, slow, log)

    def stopped_in(phase: str) -> None:
        phase_file, before = run_dir / "phase.json", log.stat().st_size if log.exists() else 0
        process = start(phase)

        def reached() -> bool:
            if phase == EXPORT:
                return EXPORT in log.read_text()[before:]
            return phase_file.exists() and json.loads(phase_file.read_text())["phase"] == phase

        deadline = time.monotonic() + 120
        while not reached():
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        time.sleep(PAUSE_S)
        process.terminate()
        process.join(ENDS_S)
        assert process.exitcode == 0, log.read_text()
        assert "SIGTERM" in log.read_text()[before:]
        assert not (run_dir / "finished").exists()

    stopped_in("validating")
    assert not metrics(run_dir)
    stopped_in("reference rewards")
    with contextlib.closing(sqlite3.connect(run_dir / "reference_rewards.sqlite")) as store:
        assert 0 < store.execute("SELECT COUNT(*) FROM rewards").fetchone()[0] < 4 * 8
    assert [sorted(line)[-1].split("/")[0] for line in metrics(run_dir)] == ["validation"]  # and no step
    stopped_in(EXPORT)
    assert (run_dir / "checkpoints" / "step_000001").exists()
    assert not [path for path in run_dir.iterdir() if "hf_model" in path.name]
    last = start()
    last.join(300)
    assert last.exitcode == 0, log.read_text()
    assert (run_dir / "finished").exists()
    assert (run_dir / "hf_model" / "model.safetensors").exists()
