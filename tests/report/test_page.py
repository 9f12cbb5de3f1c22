"""The page in a real browser: it draws without a network, filters, and stays what it is whatever completions hold."""

from __future__ import annotations

import json
import os

import pytest

from nemo_aapo.report.page import write_report
from tests.report import browser as chromium
from tests.report.made_runs import make_run, make_trace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING),
]

HOSTILE = (
    "</script><script>document.body.dataset.hacked = 'yes'</script>"
    "<img src=x onerror=\"document.body.dataset.hacked='yes'\"><a href='javascript:alert(1)'>&lt;b&gt; "
    "\u202etxet desrever\u202c \x00\x07\x1b[31m \ud800 \u2028 \u2029 ${7*7} $x^2$ \\boxed{}"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    write_report([run], run / "report.html")
    return run / "report.html"


def says(browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).textContent")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_the_page_draws_its_curves_without_a_network_or_a_complaint(browser, page, width, dark, tmp_path):
    browser.open(page, width, dark)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    assert int(browser.evaluate("document.body.dataset.ready")) > 15
    painted = """[...document.querySelectorAll('canvas')].every((c) =>
        c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0))"""
    assert browser.evaluate(painted)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 150) == dark
    assert len(browser.screenshot(tmp_path / "page.png")) > 20_000
    assert says(browser, "#findings").count("Nothing stands out") == 1


def test_completions_are_filtered_coloured_and_shown_beside_their_group(browser, page):
    browser.open(page)
    assert says(browser, "#found") == "80 of 80 completions"
    browser.evaluate("""(() => { const box = document.getElementById('search');
        box.value = 'STEP 17 '; box.dispatchEvent(new Event('input')); })()""")
    assert says(browser, "#found") == "2 of 80 completions"
    assert says(browser, "#completions pre.text").startswith("prompt 17")
    choose(browser, "show", "wrong")
    assert says(browser, "#found") == "1 of 80 completions"
    choose(browser, "colour", "entropy")
    assert browser.evaluate("document.querySelectorAll('#completions pre.text span').length") == 60
    browser.evaluate("document.querySelector('#completions button').click()")
    assert browser.evaluate("document.querySelectorAll('#completions .member').length") == 2
    browser.evaluate("document.querySelector('#prompts button.quiet-button').click()")
    assert "step 40, 3 of 3 right; the greedy one ends:answer 0" in says(browser, "#prompts tr.detail")
    assert browser.complaints == []


def choose(browser, label: str, value: str) -> None:
    browser.evaluate(f"""(() => {{ const box = [...document.querySelectorAll('#rollouts label')]
        .find((l) => l.textContent.startsWith({label!r})).querySelector('select');
        box.value = {value!r}; box.dispatchEvent(new Event('change')); }})()""")


def test_a_traced_step_is_drawn_for_every_process_and_its_names_do_nothing(browser, tmp_path):
    run = make_run(tmp_path / "traced", steps=4)
    make_trace(run, 2, ranks=1)
    make_trace(run, 4, name=HOSTILE, ranks=2)
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html", width=390)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    owners = "[...document.querySelectorAll('#timeline .process')].map((b) => b.textContent)"
    both = ["rank 0", "rank 1", "reward workers of rank 0", "reward workers of rank 1", "rollout server 0"]
    assert browser.evaluate(owners) == both
    assert browser.evaluate("document.body.dataset.hacked") is None
    titles = browser.evaluate("[...document.querySelectorAll('#timeline .span')].map((s) => s.title).join()")
    assert "</script>" in titles
    assert "wait for all_reduce (wait): 13.0 ms, 1.3 % of what is shown" in titles
    browser.evaluate("""(() => { const box = document.querySelector('#timeline select');
        box.value = '2'; box.dispatchEvent(new Event('change')); })()""")
    assert browser.evaluate(owners) == ["rank 0", "reward workers of rank 0", "rollout server 0"]
    assert "trace/step_000004.json" in says(browser, "#timeline")


def test_training_prompts_that_came_again_show_how_their_reward_moved(browser, tmp_path):
    run = make_run(tmp_path / "again", steps=4)
    for step in (1, 4):
        path = run / "rollouts" / f"train_{step:06d}.jsonl"
        rows = [{**json.loads(line), "source": "same", "reward": step / 4} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    cells = "[...document.querySelectorAll('#trained span.cell')].map((c) => c.textContent)"
    assert browser.evaluate(cells) == ["step 1: 0.25", "step 4: 1"]
    browser.evaluate("document.querySelector('#trained button.quiet-button').click()")
    assert browser.evaluate("document.querySelectorAll('#trained .member').length") == 4
    assert browser.complaints == []


def test_smoothing_and_zoom_reach_all_curves(browser, page):
    browser.open(page)
    browser.evaluate("setRange({ min: 10, max: 20 })")
    assert browser.evaluate(
        "plots.filter(({ u }) => u).every(({ u }) => u.scales.x.min === 10 && u.scales.x.max === 20)"
    )
    browser.evaluate("setRange(null)")
    assert browser.evaluate("plots.find(({ u }) => u).u.scales.x.max") == 40
    assert browser.evaluate("smoothed([0, null, 1], 0.5)") == [0, None, pytest.approx(2 / 3)]


def test_the_legend_says_what_the_files_hold_and_not_what_smoothing_makes_of_it(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=20, time_train=lambda done: 4.0 if done < 1 else 40.0)
    write_report([run], tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    legend = browser.evaluate("""Object.fromEntries([...document.querySelectorAll('#chart-phases .u-legend .u-series')]
        .map((r) => [...r.children].map((c) => c.textContent)))""")
    *_, last, _ = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())  # the last line is a validation's
    assert [float(legend[phase]) for phase in ("rollout", "train")] == [last["time/rollout"], last["time/train"]]
    assert last["time/train"] == 40.0


def test_hostile_texts_are_shown_and_do_nothing(browser, tmp_path):
    run = make_run(tmp_path / "a<b>&'\"<script>", steps=4, text=HOSTILE)
    rows = (run / "rollouts" / "train_000004.jsonl").read_text().split("\n")
    long = {
        **json.loads(rows[0]),
        **dict.fromkeys(("prompt", "completion", "source", "answer"), "x" * 1_000_000),
        "group": 9,
    }
    (run / "rollouts" / "train_000004.jsonl").write_text("\n".join([*rows[:-1], json.dumps(long), ""]))
    write_report([run], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 300_000
    browser.open(tmp_path / "page.html")
    for element in ("#rollouts button", "#prompts button.quiet-button"):
        browser.evaluate(f"document.querySelectorAll({element!r}).forEach((b) => b.click())")
    assert browser.requests == [(tmp_path / "page.html").as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.body.dataset.hacked") is None
    assert (
        browser.evaluate("document.querySelectorAll('img, iframe, object, script').length") == 2
    )  # its data and script
    assert browser.evaluate("[...document.links].every((a) => a.getAttribute('href').startsWith('#'))")
    text = says(browser, "#completions")
    assert "</script><script>" in text
    assert "996,000 characters left out" in text
    assert all(mark in text for mark in ("⟦U+202E⟧", "⟦U+0000⟧", "⟦U+001B⟧", "⟦U+D800⟧", "⟦U+2028⟧"))


def test_runs_are_drawn_over_each_other_with_their_seeds_as_a_band(browser, tmp_path):
    runs = [
        make_run(tmp_path / name, seed=seed, lr=lr)
        for name, seed, lr in (("a", 1, 1e-6), ("b", 2, 1e-6), ("c", 1, 5e-6))
    ]
    write_report(runs, tmp_path / "comparison.html")
    browser.open(tmp_path / "comparison.html")
    assert browser.complaints == []
    assert "model.optim.lr" in says(browser, "#differences")
    drawn = "linesOf(DATA.charts.curves[0]).map((line) => [line.label, Boolean(line.low)])"
    assert browser.evaluate(drawn) == [["a (2 seeds)", True], ["c", False]]
    for unticked, left in enumerate(("b", "a")):
        box = f"document.querySelectorAll('#overview input[type=checkbox]')[{unticked}].click()"
        browser.evaluate(box)
        assert browser.evaluate(drawn) == [[left, False], ["c", False]]
        browser.evaluate(box)
    assert "8 prompts" in says(browser, "#overview")
    column = "[...document.querySelectorAll('#overview tbody tr')].map((row) => row.cells[3].textContent)"
    assert all("±" in accuracy for accuracy in browser.evaluate(column))
    metrics = runs[2] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("accuracy_sampled", "of_another_kind"))
    write_report(runs, tmp_path / "comparison.html")
    browser.open(tmp_path / "comparison.html")
    greedy = "DATA.runs.map((run) => shown(last(run.validations['validation/accuracy_greedy'])))"
    assert browser.evaluate(column) == browser.evaluate(greedy)  # of all runs, if one has nothing else


def test_a_long_run_is_a_small_page_that_opens_at_once(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # two thousand files for the test alone
    run = make_run(tmp_path / "long", steps=1_000, length=500)
    write_report([run], run / "report.html")
    assert (run / "report.html").stat().st_size < 3_000_000
    browser.open(run / "report.html")
    assert browser.cpu_seconds() < 2.0
    assert browser.evaluate("document.querySelectorAll('*').length") < 5_000  # and not some for each of 1,000 steps
    assert says(browser, "#found") == "2,000 of 2,000 completions"
    escaped = make_run(tmp_path / "escaped", steps=100, text="<" * 4_000)  # each is six bytes of the page
    write_report([escaped], escaped / "report.html")
    assert 1_000_000 < (escaped / "report.html").stat().st_size < 3_000_000
