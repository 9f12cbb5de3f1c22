"""A run directory as the page's data: which settings differ, thinned curves, which completions, how runs compare."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
import threading
from pathlib import Path

import pytest

from nemo_aapo.cli.view import report, runs
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.report import completions, own_page
from nemo_aapo.report.compare import differing_settings, paired_differences, seeds_alike
from nemo_aapo.report.completions import clipped, read_groups, read_history, spread
from nemo_aapo.report.inert import inert_json
from nemo_aapo.report.own_page import OwnPage
from nemo_aapo.report.page import describe
from nemo_aapo.report.read import read_run
from nemo_aapo.report.series import columns, thinned
from nemo_aapo.report.timeline import read_traces
from nemo_aapo.utils.files import to_json, write_atomic
from tests.report.made_runs import make_run, make_trace, row

pytestmark = pytest.mark.slow

PUBLISHED = {
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", steps=12)


def test_settings_that_were_set_are_those_that_differ_from_the_defaults(run):
    found = read_run(run)
    changed = {key: (value, default) for key, value, default in found["changed"]}
    assert changed.items() >= {"trainer.max_steps": ("12", "100"), "seed": ("1", "1234")}.items()
    must_be_given = {key for key, (_, default) in changed.items() if default == "???"}
    assert set(changed) - must_be_given == {"run.name", "seed", "trainer.max_steps", "validation.reward"}
    assert found["state"] == "interrupted"
    assert found["steps"]["step"] == list(range(1, 13))
    assert found["steps"]["tokens"][-1] == 12 * 7500
    assert found["steps"]["time/other"][0] == pytest.approx(0.2)
    assert [found["steps"][f"groups/{kind}"][0] for kind in ("mixed", "by_margin")] == pytest.approx([0.7, 0.25])


def test_traces_are_named_and_the_newest_drawn_and_a_damaged_one_is_named(tmp_path):
    run = make_run(tmp_path / "traced", steps=2)
    assert read_traces(run) == []
    for step in (1, 2, 10):
        make_trace(run, step)
    found = read_traces(run)
    assert [(trace["step"], "tracks" in trace) for trace in found] == [(10, True), (2, True), (1, False)]
    (loop, *_) = found[0]["tracks"]
    assert loop[:2] == ["rank 0", "loop"]
    assert [(name, depth) for name, _, _, _, depth in loop[2]][:2] == [("step 10", 0), ("rollout", 1)]
    for damaged in (
        "{",
        "[]",
        '{"traceEvents": [{"ph": "X"}], "otherData": {}}',
        '{"traceEvents": 3, "otherData": {}}',
    ):
        (run / "trace" / "step_000010.json").write_text(damaged)
        with pytest.raises(RunError, match=r"step_000010\.json: no trace"):
            read_traces(run)


STRANGE = (None, True, -1, 10**400, 1e308, float("nan"), "x", "</script>", [], [1, "x"], {}, {"a": float("inf")})


@pytest.mark.parametrize("name", ["train_000002", "step_000002"])
def test_whatever_a_damaged_line_holds_is_shown_as_numbers_and_texts_or_refused_by_name(tmp_path, name):
    run = make_run(tmp_path / "strange", steps=2)
    path = run / "rollouts" / f"{name}.jsonl"
    first, *others = path.read_text().splitlines()
    row, refused = json.loads(first), []
    for key, value in [(key, value) for key in row for value in STRANGE]:
        path.write_text("\n".join([json.dumps({**row, key: value}), *others, ""]))
        try:
            inert_json([read_groups(run), read_history(run, "math")])
        except RunError as error:
            refused.append(str(error))
    assert all(f"{name}.jsonl: no rollouts" in said for said in refused)
    assert 0.1 < len(refused) / (len(row) * len(STRANGE)) < 0.7


def test_a_number_that_is_not_finite_is_a_gap_wherever_it_stands(tmp_path):
    run = make_run(tmp_path / "gaps", steps=2)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": Infinity, "time/step": NaN, "lr": 1e400, "entropy": 1}\n')
    found = describe(run)
    assert [found["steps"][name] for name in ("loss", "time/step", "lr", "entropy")] == [[None]] * 3 + [[1]]
    assert inert_json(found)


def test_a_long_curve_is_thinned_by_means_and_the_lowest_stays_the_lowest():
    lines = [{"step": s, "loss": float(s), "negative_advantage_logprob": -float(s == 77)} for s in range(1, 1001)]
    thin = thinned(columns(lines), points=100)
    assert thin["step"] == list(range(10, 1001, 10))
    assert thin["loss"][:2] == [5.5, 15.5]
    assert min(thin["negative_advantage_logprob"]) == -1.0


def test_what_is_said_of_a_long_run_is_said_of_its_steps_and_not_of_its_thinned_curves(tmp_path):
    """Four spikes in 20,000 steps are there, and what ended 150 steps ago is none of the last 20."""
    run = make_run(tmp_path / "long", steps=1)
    metrics = {"loss": 0.1, "grad_norm": 1.0, "truncated_fraction": 0.5}
    changes = {s: {"grad_norm": 100.0} for s in (7, 5_007, 10_007, 15_007)}
    changes |= {s: {"truncated_fraction": 0.0} for s in range(19_851, 20_001)}
    lines = ({"step": s, **metrics, **changes.get(s, {})} for s in range(1, 20_001))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = describe(run)
    assert len(found["steps"]["grad_norm"]) == len(found["steps"]["step"]) == 2_000
    assert [finding["text"] for finding in found["findings"]] == [
        "the gradient norm was above 20 times its median (1) in 3 steps"  # the first quarter is left out
    ]


def test_a_page_has_completions_of_the_whole_run_within_its_budget(run, monkeypatch):
    assert [group["step"] for group in read_groups(run)] == list(range(1, 13))
    monkeypatch.setattr(completions, "COMPLETIONS", 8)
    kept = [group["step"] for group in read_groups(run)]
    assert kept[-1] == 12
    assert len(kept) == 4
    assert kept[0] < 6
    monkeypatch.setattr(completions, "TOKEN_BYTES", 0)
    assert all(c[-1] is None for group in read_groups(run) for c in group["completions"])
    order = spread(range(1, 1001))
    assert sorted(order) == list(range(1, 1001))
    assert max(b - a for a, b in zip(sorted(order[:40]), sorted(order[:40])[1:], strict=False)) < 70
    assert clipped("a" * 9, 2, 3).startswith("aa\n[... 4 characters left out")


def test_a_damaged_file_is_named_and_ends_no_run(run, tmp_path):
    path = run / "rollouts" / "train_000003.jsonl"
    before, notes = path.read_text(), []
    path.write_text(before + '{"half')
    with pytest.raises(RunError, match=r"train_000003\.jsonl: no rollouts"):
        read_groups(run)
    page = OwnPage(run, notes.append, enabled=True)
    page.finish("stopped")
    assert re.match(r"warning: .*report\.html could not be written: .*train_000003", notes[0])
    path.write_text(before)
    page.finish("stopped")
    assert len(notes) == 1
    assert (run / "report.html").stat().st_size > 50_000
    with pytest.raises(ConfigError, match="no run is there"):
        read_run(tmp_path)


@pytest.mark.parametrize(("character", "whole"), [("x", True), ("<", False)])
def test_the_history_of_prompts_takes_its_bytes_of_the_page_and_no_more(tmp_path, character, whole):
    for step in range(20):
        rows = [row(character * 2_000, character * 2_000, 1.0, None) for _ in range(510)]
        lines = [to_json({**line, "source": f"data.jsonl:{n}"}) + "\n" for n, line in enumerate(rows)]
        write_atomic(tmp_path / "rollouts" / f"step_{step:06d}.jsonl", "".join(lines))
    found = read_history(tmp_path, "math")
    assert found["count"] == 510
    assert len(inert_json(found)) < completions.HISTORY_BYTES + 1_000
    assert (len(found["prompts"]) == 500, found["prompts"][99]["at"][-1][2] is not None) == (whole, whole)


def test_tokens_that_are_thinned_as_they_are_read_are_those_of_a_run_that_kept_none(tmp_path, monkeypatch):
    run, read = make_run(tmp_path / "run", steps=2), Path.read_bytes

    def thinned_just_now(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", thinned_just_now)
    shown = [completion for group in read_groups(run) for completion in group["completions"]]
    assert [(completion[0][:6], completion[-1]) for completion in shown] == [
        *[("step 1", None)] * 2,
        *[("step 2", None)] * 2,
    ]


def test_a_page_that_is_never_done_holds_no_run(tmp_path, monkeypatch):
    done, notes = threading.Event(), []
    monkeypatch.setattr(own_page, "write_report", lambda *args: done.wait(60))
    monkeypatch.setattr(own_page, "FINISH_S", 0.05)
    page = OwnPage(tmp_path, notes.append, enabled=True)
    page.begin()
    page.begin()
    page.finish("stopped")
    done.set()
    (note,) = notes
    assert re.match(r"warning: .*report\.html could not be written: report: not written within", note)


def test_no_text_ends_the_element_that_holds_the_data():
    hostile = ["</script>", "<!--", "]]>", "&amp;", "\u2028", "\ud800", "\x00"]
    text = inert_json(hostile)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == hostile


def test_runs_are_told_apart_by_settings_and_paired_by_prompt(tmp_path, monkeypatch):
    made = [make_run(tmp_path / n, 8, seed=s, lr=lr) for n, s, lr in (("a", 1, 1e-6), ("b", 2, 1e-6), ("c", 1, 5e-6))]
    rows = (made[2] / "rollouts" / "step_000008.jsonl").read_text().splitlines()
    worse = [{**json.loads(line), "reward_parts": {"math": float(i % 3 == 0)}} for i, line in enumerate(rows)]
    (made[2] / "rollouts" / "step_000008.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worse))
    found = [describe(path) for path in made]
    assert {row["key"] for row in differing_settings(found)} == {"seed", "model.optim.lr"}
    assert seeds_alike(found) == [[0, 1], [2]]
    _, same, other = paired_differences(found)
    assert (same["difference"], same["stderr"], same["prompts"], same["step"]) == (0.0, 0.0, 8, 8)
    assert other["difference"] == pytest.approx(-1)  # the greedy one, which is right, is not among the sampled ones
    history = read_history(made[0], "math")
    assert history["steps"] == [0, 2, 4, 6, 8]
    assert [prompt["at"][0] for prompt in history["prompts"]][:2] == [[0, 3, "answer 0"], [0, 3, "answer 0"]]
    monkeypatch.setattr(completions, "TOLD", 1)
    ends = [[at[2] for at in prompt["at"]] for prompt in read_history(made[0], "math")["prompts"]]
    assert ends == [["answer 0"] * 5, *[[None] * 5] * 7]
    assert report.main([str(tmp_path), f"out={tmp_path}/all.html"]) == 0
    assert (tmp_path / "all.html").stat().st_size > 100_000
    assert report.main([str(made[0])]) == runs.main([str(tmp_path)]) == 0
    assert report.main([str(tmp_path / "nowhere")]) == 2


def test_runs_are_paired_at_their_last_common_validation_on_all_prompts_by_their_sampled_completions(tmp_path):
    """However many validations a page shows, and however many runs share it: 40 and 39 validations, 64 prompts."""
    runs = [tmp_path / "long", tmp_path / "short"]
    for run, last in zip(runs, (390, 380), strict=True):
        for step in range(0, last + 1, 10):
            rights = (run.name == "short", step == 380, step == 380 and run.name == "short")  # greedy, two samples
            rows = [row(str(n), "", float(right), None) for n in range(64 if step == 380 else 2) for right in rights]
            write_atomic(run / "rollouts" / f"step_{step:06d}.jsonl", "".join(to_json(r) + "\n" for r in rows))
    described = [{"directory": str(run), "verdict": "math"} for run in runs]
    _, found = paired_differences(described)
    assert found == {"difference": 0.5, "stderr": 0.0, "step": 380, "prompts": 64}
    path = runs[1] / "rollouts" / "step_000380.jsonl"
    write_atomic(path, "".join(path.read_text().splitlines(keepends=True)[::3]))  # as validation.samples=0 leaves it
    assert paired_differences(described)[1]["difference"] == 1  # greedy less greedy, not greedy less sampled
    assert paired_differences(described[::-1])[1]["difference"] == -1
    for path in (runs[1] / "rollouts").iterdir():
        path.rename(path.with_name(f"step_{int(path.stem[5:]) + 1:06d}.jsonl"))
    assert paired_differences(described) == [None, None]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "out=: the path is empty"),
        (".", "out=.: is a directory; name a file"),
        ("/proc/x", "out=/proc/x: nothing can be written in /proc ("),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(run, capsys, out, said):
    assert report.main([str(run), f"out={out}"]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_what_the_page_is_drawn_with_is_what_was_published():
    """The digests of npm's uplot-1.6.32.tgz, whose integrity in the registry is sha512-KIMVnG68zvu5XXUbC4LQ...."""
    folder = importlib.resources.files("nemo_aapo.report") / "assets"
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in PUBLISHED}
    assert digests == PUBLISHED
    assert "MIT" in (folder / "uPlot.LICENSE").read_text()
