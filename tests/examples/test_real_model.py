"""The demonstration on a real model: each part once, a kill that is one, and a report of what the runs left."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import pytest

from examples.real_model import report, runs
from examples.real_model.runs import COMPARED, KILLED_AFTER, STEPS, Demonstration
from nemo_aapo.errors import RunError

ROOT = Path(__file__).parents[2]
FAKE_TRAIN = """
import json, pathlib, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
run, last = pathlib.Path(given["run.dir"]), int(given["trainer.max_steps"])
run.mkdir(exist_ok=True)
with open(run.parent / "calls", "a") as file:
    print(pathlib.Path(sys.argv[0]).stem, run.name, file=file)
if (run.parent / "fail").exists():
    sys.exit(3)
path = run / "metrics.jsonl"
done = sum("loss" in json.loads(line) for line in path.read_text().splitlines()) if path.exists() else 0
(run / "rollouts").mkdir(exist_ok=True)
with path.open("a") as file:
    for step in range(done and done + 1, last + 1):
        if step:
            times = {f"time/{phase}": 0.5 for phase in ("rollout", "reward", "reference", "train", "refit", "step")}
            line = {"step": step, "loss": step / 7, "reward/mean": step / 20, "grad_norm": 1.0, **times}
            print(json.dumps(line), file=file, flush=True)
        if step % 5 == 0:
            print(json.dumps({"step": step, "validation/accuracy_greedy": step / 20}), file=file, flush=True)
            row = {"answer": "85", "completion": f"after\u2028{step}", "reward": float(step > 0)}
            (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\\n")
        if run.name == "killed" and not done and step == 6:
            time.sleep(60)
(run / "finished").write_text("{}")
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Demonstration:
    """With a trainer that writes down what it is asked for."""
    (tmp_path / "scripts").mkdir()
    for name in ("train.py", "launch.py"):
        (tmp_path / "scripts" / name).write_text(FAKE_TRAIN)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    return Demonstration(tmp_path / "out", print)


def test_no_sum_is_both_in_training_and_held_out(here):
    here.data()
    rows = {}
    for name in ("train", "validation"):
        lines = (here.directory / "data" / f"{name}.jsonl").read_text().splitlines()
        rows[name] = {json.loads(line)["question"] for line in lines}
    assert (len(rows["train"]), len(rows["validation"])) == (runs.TRAINING_PROMPTS, runs.VALIDATION_PROMPTS)
    assert rows["train"].isdisjoint(rows["validation"])


def test_the_runs_differ_in_their_algorithm_alone(here):
    words = [here.command("train.py", name, name) for name in runs.ALGORITHMS]
    own = ("algorithm=", "algorithm.reference_store=", "run.")
    assert len({tuple(word for word in run if not word.startswith(own)) for run in words}) == 1
    assert KILLED_AFTER < COMPARED < STEPS
    assert KILLED_AFTER % runs.SAVED_AT  # in between two checkpoints


@pytest.mark.slow
def test_each_part_is_made_once_a_kill_is_taken_up_twice_and_the_report_says_it(here):
    for _ in range(2):
        for name in runs.ALGORITHMS:
            here.train(name)
        here.resume()
    made = (here.directory / "calls").read_text().split("\n")[:-1]
    assert made == [
        *(f"train {name}" for name in runs.ALGORITHMS),
        *("train killed", "train killed", "launch two_stages"),
    ]
    costs = json.loads((here.directory / "costs.json").read_text())
    assert {name: cost["starts"] for name, cost in costs.items()} == {
        **dict.fromkeys(runs.ALGORITHMS, 1),
        **{"killed": 2, "two_stages": 1},
    }
    text = report.write(here.directory)
    assert text.count("4 of 4") == 2 * COMPARED
    assert r"'after\u20280'" in text
    assert r"'after\u202810' ✓" in text
    assert "AAPO, greedy, held out" in text
    drawing = xml.dom.minidom.parse(str(here.directory / "curves.svg"))
    assert len(drawing.getElementsByTagName("polyline")) == 6
    (here.directory / "fail").touch()
    (here.directory / "gpg" / "finished").unlink()
    with pytest.raises(RunError, match="status 3"):
        here.train("gpg")


def test_the_committed_figures_are_those_of_the_page():
    page = (ROOT / "docs" / "results" / "real_model.md").read_text()
    record = json.loads((ROOT / "docs" / "results" / "real_model.json").read_text())
    metrics = {name: lines for name, lines in record["metrics"].items() if name in runs.ALGORITHMS}
    assert "aapo" in metrics
    for line in report.accuracy_table(metrics).splitlines():
        assert line in page
    assert "images/real_model.svg" in page
    xml.dom.minidom.parse(str(ROOT / "docs" / "images" / "real_model.svg"))
