"""What a person sees: one plain line a step without a terminal, a bar with the same numbers on one."""

from __future__ import annotations

import io

import pytest

from nemo_aapo.run import progress as progress_module
from nemo_aapo.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_clock_that_stands_still(monkeypatch):
    """How often a phase speaks depends on the time that has passed."""
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 1000.0)


def run(progress: Progress) -> None:
    with progress:
        progress.phase("loading the model")
        progress.phase("reference rewards", 1000)
        for _ in range(1000):
            progress.advance()
        accuracy = {"accuracy_greedy": 0.25, "accuracy_sampled": 0.2, "accuracy_sampled_stderr": 0.01}
        progress.validation(4, {f"validation/{name}": value for name, value in accuracy.items()})
        for step in range(5, 8):
            progress.phase("rollout", 8)
            for _ in range(8):
                progress.advance()
            progress.step(step, {"reward/mean": 0.5, "tokens_per_second": 1234.4, "time/step": 60.0})
        progress.note("stopping")


def test_without_a_terminal_there_is_one_line_a_step_and_none_for_the_phases_within():
    stream = io.StringIO()
    run(Progress(10, start=4, stream=stream))
    assert stream.getvalue().splitlines() == [
        "loading the model",
        "reference rewards 0 of 1000",
        "reference rewards 1000 of 1000",
        "validation at step 4: accuracy 0.250 greedy, 0.200 sampled (standard error 0.010)",
        "rollout 0 of 8",
        "rollout 8 of 8",
        "step 5/10  reward 0.500  val_accuracy 0.250  1,234 tokens/s  0:05:00 left",
        "step 6/10  reward 0.500  val_accuracy 0.250  1,234 tokens/s  0:04:00 left",
        "step 7/10  reward 0.500  val_accuracy 0.250  1,234 tokens/s  0:03:00 left",
        "stopping",
    ]


def test_on_a_terminal_a_bar_is_redrawn_in_place_and_notes_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    run(Progress(10, start=4, stream=stream))
    said = stream.getvalue()
    lasting = [line.rpartition("\r")[2].rstrip() for line in said.split("\n")]
    assert lasting[0].startswith("validation at step 4: accuracy 0.250 greedy")
    assert lasting[1] == "stopping"
    assert lasting[2].startswith("step 7/10 |##############      | reward 0.500  val_accuracy 0.250")
    assert lasting[2].endswith("0:03:00 left")
    assert len(lasting) == 4
    assert "reference rewards 1000 of 1000" in said
    assert said.count("\r") < 100  # 1000 counts were not 1000 redraws


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_show_nothing(stream):
    run(Progress(10, start=4, stream=stream, enabled=False))
    assert stream.getvalue() == ""
