"""scripts/benchmark.py runs and prints what it says. What the figures are is for people to look at."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import products
from benchmarks.measure import Figure, Timing, in_turns, ratio
from benchmarks.page import write_section
from benchmarks.scaling import Row, exponent, picture
from nemo_aapo.utils.tables import plain
from tests.benchmarks.quick import quick

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rollout_benchmark_prints_whole_tables(tmp_path):
    printed, figures = quick("rollout", tmp_path)
    combinations = [(row["prompts"], row["lengths"]) for row in figures["generate"]]
    assert combinations == [(p, n) for p in ("groups of 8", "each its own") for n in ("fixed", "variable")]
    for row in figures["generate"]:
        assert 0 < row["engine"]["low"] <= row["engine"]["median"] <= row["engine"]["high"]
        assert (row["tail_factor"] == 1.0) == (row["lengths"] == "fixed")
    assert [row["algorithm"].split(",")[0] for row in figures["steps"]] == ["GPG", "AAPO", "AAPO"]
    assert figures["steps"][0]["ratio"]["median"] == 1.0
    for row in (*figures["generate"], *figures["steps"]):
        name = row.get("model") or row["algorithm"]
        assert any(line.startswith(name) for line in printed.splitlines()), printed
    for block in printed.strip().split("\n\n"):
        _, header, rule, *rows = block.splitlines()
        assert set(rule) == {"-", " "}
        assert len({len(line) for line in (header, rule, *rows)}) == 1, block


@pytest.mark.slow
def test_the_sharing_benchmark_compares_steps_on_the_same_groups(tmp_path):
    printed, _ = quick("sharing", tmp_path)
    header, _, row = printed.splitlines()
    assert header.split()[0] == "prompt,"
    assert row.split()[:2] == ["16", "4"]
    assert row.split()[-1] == "0.60"  # of tokens: (16 / 2 + 4) / (16 + 4)


def test_the_products_of_a_decoding_step_are_counted_in_every_layout(monkeypatch):
    def a_second_each(contestants, repeats):
        return {name: run() or repeats * [Timing(1.0, 1.0)] for name, run in contestants.items() if name != "peak"} | {
            "peak": [Timing(1.0, 1.0)]
        }

    monkeypatch.setattr(products, "in_turns", a_second_each)
    rows = {row.product: row for row in products.measure(products.QUICK)}
    assert list(rows) == ["query, key, value", "attention's output", "gate, up", "down", "output layer"]
    for row in rows.values():
        assert set(row.layouts) == set(products.LAYOUTS)
        assert row.peak == pytest.approx(2e-9 * 64**3)
    # 2 rows, 32 inputs, gate and up of 64 units each, and four such weights of 16 KiB
    assert rows["gate, up"].layouts["oneDNN"] == pytest.approx(2e-9 * 2 * 32 * 128 * 4)
    header, cells = products.table(list(rows.values()))
    assert all(len(line) == len(header) for line in cells)


@pytest.mark.slow
def test_the_rewards_benchmark_prints_speeds_and_what_hostile_completions_cost(tmp_path):
    printed, figures = quick("rewards", tmp_path)
    assert [row["reward"] for row in figures["speeds"]] == ["accuracy", "integer"]
    assert all(row["items_per_cpu_second"]["median"] > 0 for row in figures["speeds"])
    assert [row["other_score"] for row in figures["hostile"]] == [1.0] * 6
    for name in ("accuracy", "9^{9^{9^{9}}}", "10 MB of open boxes"):
        assert any(line.startswith(name) for line in printed.splitlines()), printed


def test_contestants_take_turns_after_a_warm_up():
    calls: list[str] = []
    timings = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert calls == list("abababab")
    assert [len(timings[name]) for name in "ab"] == [3, 3]


def test_ratios_compare_turn_by_turn():
    slow, fast = [Timing(4.0, 2.0), Timing(9.0, 2.0)], [Timing(2.0, 1.0), Timing(3.0, 2.0)]
    assert ratio(slow, fast, "wall") == Figure(2.5, 2.0, 3.0)
    assert ratio(slow, fast, "cpu") == Figure(1.5, 1.0, 2.0)


def test_a_table_has_its_first_column_left_and_the_others_right():
    text = plain(("what", "n"), [("a", "1,000"), ("longer", "7")])
    assert text.splitlines() == ["what        n", "------  -----", "a       1,000", "longer      7"]


def test_a_section_of_a_page_is_replaced_between_its_markers_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\nc\n")
    for _ in range(2):  # writing again changes nothing
        write_section(page, "one", "new\n")
        assert page.read_text() == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\nc\n"
    with pytest.raises(ValueError, match=r"page.md: needs the lines <!-- three --> and <!-- /three -->"):
        write_section(page, "three", "new")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_scaling_benchmark_says_how_costs_grow_what_ranks_say_to_each_other_and_what_a_start_costs(tmp_path):
    page = (ROOT / "docs" / "results" / "benchmarks.md").read_text()
    _, figures = quick("scaling", tmp_path, limit_s=600)
    assert [(row["factor"], row["tokens"]) for row in figures["growth"]] == [(1, 512), (2, 1024), (1, 512), (2, 512)]
    assert all(0 < row["rollout_share"] < 1 and row["cost"]["low"] > 0 for row in figures["growth"])
    alone, tp = figures["layouts"]
    assert 0 <= alone["communication"] < tp["communication"] < 1
    assert alone["collectives"] < 10 < tp["collectives"]
    start = figures["start"]
    parts = sum(start["imports"].values()) + start["before"] + start["step"]
    assert abs(parts - start["total"]["median"]) < 0.01  # nothing is counted twice, nothing forgotten
    assert start["imports"]["torch"] > 0
    assert min(start["before"], start["step"]) > 0
    assert (ROOT / "docs" / "results" / "benchmarks.md").read_text() == page


def growing(dimension, ratios):
    one = Figure(1.0, 1.0, 1.0)
    return [Row(dimension, 2**i, 8 * 2**i, 64, one, Figure(r, r, r), 0.5) for i, r in enumerate(ratios)]


def test_growth_is_an_exponent_of_the_whole_cost_over_the_last_doubling():
    assert exponent(growing("group size", [1.0, 0.8, 0.8])) == pytest.approx(1.0)
    assert exponent(growing("completion length", [1.0, 1.0, 2.0])) == pytest.approx(2.0)
    assert exponent(growing("layers", [1.0, 1.5, 3.0])) == pytest.approx(1.0)
    assert exponent(growing("vocabulary", [1.0, 1.0])) == pytest.approx(0.0)


def test_the_picture_of_growth_is_whole():
    rows = [row for name in ("group size", "layers") for row in growing(name, [1.0, 1.2, 1.6, 3.0])]
    root = ElementTree.fromstring(picture(rows))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count("times the size") == 2
    assert {"group size", "layers", "8"} <= set(texts)
