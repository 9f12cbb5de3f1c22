"""What a soak reports of what its processes held."""

from __future__ import annotations

import os

from benchmarks.soak import Held, Plan, growth, held_by, report


def test_growth_is_counted_in_1000_steps_from_where_it_has_settled():
    memory = {50: 100, 100: 140, 200: 140.5, 300: 141}
    looks = {step: {"trainer": Held(rss, 20 + step // 100, 8, 0)} for step, rss in memory.items()}
    plan = Plan(steps=300, settled=100, every=50)
    assert growth(looks, plan, "trainer") == {"rss": 5.0, "descriptors": 10.0, "threads": 0.0, "children": 0.0}
    table = report({"local": looks}, plan).splitlines()
    assert [cell.strip() for cell in table[2].strip("|").split("|")] == [
        "local, trainer", "300", "141.0 (+5.00)", "23 (+10.0)", "8 (+0.0)", "0 (+0.0)"
    ]  # fmt: skip


def test_a_process_is_looked_at_from_outside():
    held = held_by(os.getpid())
    assert held.rss > 1
    assert held.threads >= 1
    assert held.descriptors >= 3
