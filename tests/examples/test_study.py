"""The study: statistics that say what they should, every run once, and a report of what the runs did."""

from __future__ import annotations

import json
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.quickstart.base_model import Recipe
from examples.study import design, picture, report
from examples.study.design import ARMS, COMPARISONS, PARTS, Comparison, Run, runs_of
from examples.study.runs import WORDS, make_runs
from examples.study.statistics import Curve, Interval, common_budget, difference, holds
from examples.study.tasks import TASKS, RareSums, Task
from nemo_aapo.errors import ConfigError, RunError

ROOT = Path(__file__).parents[2]


def curve(*accuracy: float, spent: tuple[float, ...] = (0, 10, 20)) -> Curve:
    return Curve(np.array(accuracy), {"steps": np.array(spent, dtype=float)})


def test_a_mean_until_a_budget_is_the_area_under_straight_lines_and_none_beyond_the_end():
    rising = curve(0.0, 0.4, 0.6)
    assert rising.mean_until("steps", 10) == pytest.approx(0.2)
    assert rising.mean_until("steps", 20) == pytest.approx((0.2 + 0.5) / 2)
    assert rising.mean_until("steps", 15) == pytest.approx((10 * 0.2 + 5 * 0.45) / 15)
    assert rising.at("steps", 15) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="made up"):
        rising.mean_until("steps", 21)
    assert common_budget([[rising], [curve(0, 1, spent=(0, 12))]], "steps") == 12


def test_intervals_are_those_of_the_t_distribution():
    two = Interval.of([0.1, 0.3])  # one degree of freedom: tan(0.475 pi) standard errors
    assert two.half == pytest.approx(np.tan(0.475 * np.pi) * 0.1)
    three = Interval.of([1.0, 2.0, 3.0])  # two: 2 c / sqrt(2 - 2 c^2) with c = 0.95 / sqrt 2
    c = 0.95
    assert three.half == pytest.approx(c * np.sqrt(2 / (1 - c * c)) / np.sqrt(3))
    generator = np.random.default_rng(8)
    intervals = [Interval.of(generator.normal(0.7, 0.05, 5)) for _ in range(2000)]
    covered = np.mean([abs(i.mean - 0.7) <= i.half for i in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_seed_and_judged_by_their_interval():
    noise = (0.0, 0.3, -0.2)
    arm = [curve(0, 0.5 + n, 0.5 + n) for n in noise]
    other = [curve(0, 0.45 + n, 0.45 + n) for n in noise]
    found = difference(arm, other, "steps", 20)
    assert (found.mean, found.half) == (pytest.approx(0.05 * 0.75), pytest.approx(0, abs=1e-12))
    assert [Interval(m, 0.1).verdict for m in (0.2, -0.2, 0.05, -0.1)] == ["higher", "lower", "equal", "equal"]
    assert holds("higher", found)
    assert not holds("equal", found)


def test_the_reference_is_paid_for_prompt_by_prompt_until_all_have_been_seen(tmp_path):
    lines = [{"step": 0, "validation/accuracy_sampled": 0.2, "validation/completion_length": 5.0}]
    for step in range(1, 31):
        lines.append({"step": step, "loss": 0.0, "completion_length/mean": 3.0})
        if step % 10 == 0:
            lines.append({"step": step, "validation/accuracy_sampled": 0.5, "validation/completion_length": 3.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone, with_reference = (report.read_curve(path, reference=known) for known in (False, True))
    policy = np.array([0, 10, 20, 30]) * 256
    drawn = np.array([0, 320, 640, 640]) * 8
    assert alone.spent["completions"].tolist() == policy.tolist()
    assert alone.spent["tokens"].tolist() == (policy * 3).tolist()
    assert with_reference.spent["completions"].tolist() == (policy + drawn).tolist()
    assert with_reference.spent["tokens"].tolist() == (policy * 3 + drawn * 5).tolist()


def test_the_design_is_whole_and_its_arms_differ_in_their_settings_alone(tmp_path):
    planned = {(task, arm) for part in PARTS.values() for task, arm in part}
    assert {arm for _, arm in planned} == set(ARMS)
    for c in COMPARISONS:
        assert {(c.task, c.arm), (c.task, c.other)} <= planned, c
        assert c.expected in ("higher", "equal", "lower")
    own = ("algorithm", "run.", "rollout.async_depth")
    words = [Run(TASKS["sums"], arm, 3).words(tmp_path) for arm in ("aapo", "grpo", "aapo, 2 behind, masked")]
    assert len({tuple(w for w in run if not w.startswith(own)) for run in words}) == 1
    runs = runs_of(list(PARTS), (1, 2))
    assert len({run.directory(tmp_path) for run in runs}) == len(runs) == 2 * len(planned)
    for parts, seeds in ((["levels"], (1, 2)), (["levers"], (1,)), (["levers"], (1, 1))):
        with pytest.raises(ConfigError):
            runs_of(parts, seeds)


def test_right_answers_are_as_rare_as_they_are_said_to_be():
    import random

    generator = random.Random(0)
    items = RareSums().lesson().supervised
    right = sum(item.noisy_answer(generator) == item.answer for item in items)
    assert right / len(items) == pytest.approx(0.02, abs=0.006)


@pytest.mark.slow
def test_a_small_study_makes_each_run_once_and_reports_what_they_did(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", Task("tiny", "a tiny task", Recipe(clean_steps=1, noisy_steps=1), steps=2))
    small = ("validation.max_prompts=4", "validation.samples=1", "trainer.val_check_interval=1", "prompts_per_step=2")
    runs = [Run(TASKS["tiny"], arm, seed, small) for seed in (1, 2) for arm in ("aapo", "gpg")]
    said = []
    make_runs(runs, tmp_path, 2, said.append)
    make_runs(runs, tmp_path, 2, said.append)
    assert said[-1] == "4 of 4 runs are there already"
    compared = tuple(Comparison("tiny", "aapo", "gpg", axis, "equal") for axis in design.AXES)
    monkeypatch.setattr(report, "COMPARISONS", compared)
    text = report.write(runs, tmp_path)
    assert text.count("| a tiny task | ") == 2 + 3
    record = json.loads((tmp_path / "study.json").read_text())
    assert [row["axis"] for row in record["comparisons"]] == list(design.AXES)
    drawing = xml.dom.minidom.parse(str(tmp_path / "learning_curves.svg"))
    assert len(drawing.getElementsByTagName("polyline")) == 2
    assert len(xml.dom.minidom.parse(str(tmp_path / "differences.svg")).getElementsByTagName("circle")) == 3
    for more, error, message in (
        (("group_sise=2",), ConfigError, "did you mean 'group_size'"),
        (("seed=7",), ConfigError, "holds a run with other settings"),
    ):
        with pytest.raises(error, match=message):
            make_runs([replace(run, settings=(*small, *more)) for run in runs], tmp_path, 2, print)
    (runs[0].directory(tmp_path) / "finished").unlink()
    (runs[0].directory(tmp_path) / WORDS).unlink()
    with pytest.raises(RunError, match="its log ends in"):
        make_runs([replace(runs[0], settings=(*small, "seed=7"))], tmp_path, 2, print)


def test_the_first_study_keeps_its_picture_and_tables():
    text = (ROOT / "docs" / "results" / "results.md").read_text()
    assert "images/learning_curves.svg" in text
    assert all(f"| `{algorithm}` " in text for algorithm in ("aapo", "gpg", "grpo"))
    xml.dom.minidom.parse(str(ROOT / "docs" / "images" / "learning_curves.svg"))


def test_the_committed_tables_and_pictures_are_those_of_one_study():
    page = (ROOT / "docs" / "results" / "study.md").read_text()
    record = json.loads((ROOT / "docs" / "results" / "study.json").read_text())
    for row in record["comparisons"]:
        assert Interval(row["mean"], row["half"]).text(signed=True) in page, row
    for name in ("learning_curves", "differences"):
        drawing = xml.dom.minidom.parse(str(ROOT / "docs" / "images" / f"study_{name}.svg"))
        assert drawing.getElementsByTagName("text")
        assert f"images/study_{name}.svg" in page
    assert picture.NAMES.keys() == set(design.ALGORITHMS)
