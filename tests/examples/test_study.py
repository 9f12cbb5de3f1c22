"""The study: every run once, going on after an interruption; tables and picture from what the runs left."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest

from examples.study import analysis, picture, runs
from examples.study.runs import Study, run_all
from nemo_aapo.errors import ConfigError, RunError

FAKE_TRAIN = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
run = pathlib.Path(given["run.dir"])
with open(run.parents[1] / "calls", "a") as file:
    print(given["algorithm"], given["seed"], file=file)
if pathlib.Path(run.parents[1] / "fail").exists():
    sys.exit("no luck today")
better = 0.1 * (given["algorithm"] == "aapo")
with open(run / "metrics.jsonl", "w") as file:
    for step in range(11):
        accuracy = step / 20 + better * (step > 0) + int(given["seed"]) / 100
        if step:
            print(json.dumps({"step": step, "loss": 1.0, "groups/zero_advantage": 0.25, "entropy": 0.5}), file=file)
        record = {"validation/accuracy_sampled": accuracy, "validation/accuracy_greedy": accuracy}
        print(json.dumps({"step": step, **record}), file=file)
(run / "finished").write_text("{}")
"""


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """Of two algorithms and three seeds, with a trainer that writes down what it is asked for."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(runs, "TRAIN", tmp_path / "train.py")
    rows = [json.dumps({"question": f"{n}+1=", "answer": str(n + 1)}) for n in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    settings = (f"data.train={tmp_path / 'train.jsonl'}", "prompts_per_step=4")
    return Study(tmp_path / "study", ("aapo", "gpg"), (1, 2, 3), steps=10, settings=settings)


def calls(study: Study) -> list[str]:
    return (study.directory / "calls").read_text().split("\n")[:-1]


@pytest.mark.slow
def test_every_run_is_made_once_seed_by_seed_and_goes_on_after_a_failure(study):
    study.directory.mkdir()
    fail = study.directory / "fail"
    fail.touch()
    with pytest.raises(RunError, match="no luck today"):
        run_all(study, print)
    fail.unlink()
    run_all(study, print)
    assert calls(study) == ["aapo 1", *(f"{algorithm} {seed}" for seed in (1, 2, 3) for algorithm in ("aapo", "gpg"))]
    run_all(study, print)
    assert len(calls(study)) == 7


def test_runs_differ_in_algorithm_and_seed_alone(study):
    def rest(algorithm: str, seed: int) -> list[str]:
        return [
            word for word in study.overrides(algorithm, seed) if not word.startswith(("run.", "seed=", "algorithm="))
        ]

    assert rest("aapo", 1) == rest("gpg", 3)
    assert {f"algorithm={name}" for name in study.algorithms} <= {
        *study.overrides("aapo", 1),
        *study.overrides("gpg", 1),
    }


def test_settings_that_cannot_work_are_refused_before_the_first_run(study, tmp_path):
    for changes, said in (
        ({"algorithms": ("aapo", "ppo")}, "no such choice"),
        ({"settings": ("group_sise=2",)}, "did you mean 'group_size'"),
    ):
        wrong = Study(**{"directory": tmp_path / "wrong", "algorithms": ("gpg",), **changes})
        with pytest.raises(ConfigError, match=said):
            run_all(wrong, print)
        assert not (tmp_path / "wrong").exists()
    for changes in ({"seeds": (1,)}, {"seeds": (1, 1)}, {"algorithms": ("gpg", "gpg")}, {"steps": 0}):
        with pytest.raises(ConfigError):
            Study(tmp_path, **changes)


def test_a_run_with_other_settings_is_not_taken_for_one_of_the_study(study):
    record = {"id": "1", "digest": "?", "settings": {"seed": 9}, "starts": []}
    directory = study.run_directory("gpg", 2)
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        run_all(study, print)
    assert not (study.directory / "calls").exists()


@pytest.mark.slow
def test_tables_and_picture_say_what_the_runs_did(study):
    run_all(study, print)
    found = analysis.read_runs(study)
    assert found["aapo"].steps == tuple(range(11))
    drawn = 10 * 4 * 8
    assert set(found["gpg"].completions) == {drawn}
    assert set(found["aapo"].completions) == {drawn + 40 * 8}  # ten steps of four prompts, each prompt once, K = 8
    measures = analysis.measures(found["gpg"])
    assert measures["last"] == pytest.approx([0.51, 0.52, 0.53])
    assert measures["early"] == pytest.approx([0.11, 0.12, 0.13])
    assert measures["mean"] == pytest.approx([0.285, 0.295, 0.305])
    tables = analysis.tables(found)
    assert "sampled, step 2 " in tables
    assert "| `gpg`    |" in tables
    assert "+0.100 ± 0.000" in tables
    svg = picture.learning_curves(found)
    drawing = xml.dom.minidom.parseString(svg)
    curves = drawing.getElementsByTagName("polyline")
    assert len(curves) == 3  # two curves, one difference
    dashes = [curve.getAttribute("stroke-dasharray") for curve in curves]
    assert dashes[0] != dashes[1] == dashes[2]  # told apart without colours; the difference looks like the other one
    texts = [node.firstChild.data for node in drawing.getElementsByTagName("text") if node.firstChild]
    title = "Learning sums of two-digit numbers: mean of 3 seeds, shaded: its 95 % interval"
    assert {"AAPO", "GPG", "AAPO minus GPG", title} <= set(texts)
    assert "nan" not in svg


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(8)
    covered = 0
    for _ in range(2000):
        interval = analysis.Interval.of(generator.normal(0.7, 0.05, 5))
        covered += abs(interval.mean - 0.7) <= interval.half
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_committed_picture_and_tables_are_those_of_one_study():
    text = (Path(__file__).parents[2] / "docs" / "results" / "results.md").read_text()
    assert "images/learning_curves.svg" in text
    assert all(f"| `{algorithm}` " in text for algorithm in ("aapo", "gpg", "grpo"))
    xml.dom.minidom.parse(str(Path(__file__).parents[2] / "docs" / "images" / "learning_curves.svg"))
