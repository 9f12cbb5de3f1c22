"""What a training step does is what tests/guard.json says; more than that has to be explained by updating the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import guard
from benchmarks.workload import Workload, make_input

FILE = Path(__file__).parents[1] / "guard.json"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the file's counts are a CPU's")


def copy_in_each_layer(trainer):
    """What a careless ``.clone()`` in a layer would do."""
    from megatron.core.transformer import TransformerLayer

    for module in trainer.policy.module.modules():
        if isinstance(module, TransformerLayer):
            module.self_attention.register_forward_hook(lambda layer, inputs, out: (out[0].clone(), *out[1:]))


def collective_in_each_rollout(trainer):
    """What a careless ``agree`` or ``any_rank`` would do."""
    generate = trainer.rollouts.generate

    def with_one_more(step):
        torch.distributed.all_reduce(torch.zeros(1))
        return generate(step)

    trainer.rollouts.generate = with_one_more


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("guard")
    make_input(Workload(), path)
    return str(path)


@pytest.fixture(scope="module")
def counted(ranks, folder):
    """Counts of a layout, with something planted or not."""

    def count(name, plant=None):
        layout = guard.LAYOUTS[name]
        return guard.figures(name, ranks.run(guard.count, folder, layout, plant, **layout))

    return count


def of(name, counts):
    """The part of the file that is one layout's."""
    return {place: figures for place, figures in counts.items() if place.startswith(f"{name}, ")}


@pytest.mark.parametrize("name", list(guard.LAYOUTS))
def test_a_step_does_no_more_than_the_committed_file_says(counted, name):
    rows = guard.compare(of(name, guard.read(FILE)), counted(name))
    grown = [row for row in rows if row.grown]
    assert len(rows) > 25
    assert not grown, f"{guard.complaint(grown)}\n{guard.report(rows)}"


@pytest.mark.parametrize(
    ("name", "plant", "found"),
    [
        ("1 rank", copy_in_each_layer, "1 rank, layers, forward: copies, costly calls"),
        ("TP 2", collective_in_each_rollout, "TP 2, rollout: allreduce, collectives"),
    ],
)
def test_what_was_planted_is_found_and_named(counted, name, plant, found):
    rows = guard.compare(of(name, guard.read(FILE)), counted(name, plant))
    grown = [row for row in rows if row.grown]
    assert found in [f"{row.place}: {row.what}" for row in grown]
    assert found in guard.complaint(grown)
    assert any(line.startswith(found) and line.endswith("GROWN") for line in guard.report(rows).splitlines())


@pytest.mark.parametrize(
    ("what", "before", "now", "grown"),
    [
        ("operators, calls", 100, 114, False),  # a tenth and four
        ("operators, calls", 100, 115, True),
        ("allocations, calls", 1, 2, False),  # rare ones
        ("copies, costly calls", 216, 224, False),
        ("copies, costly calls", 216, 228, True),
        ("allreduce, collectives", 40, 41, True),
        ("allreduce, collectives", 0, 1, True),
        ("allreduce, collectives", 40, 30, False),
        ("mul", 100, 1000, False),  # listed only
    ],
)
def test_growth_is_judged_by_what_it_costs(what, before, now, grown):
    (row,) = guard.compare({"p": {what: before, "x": 1}}, {"p": {what: now}})
    assert row.grown == grown


def test_a_file_that_cannot_be_compared_with_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "guard.json"
    with pytest.raises(guard.GuardError, match=r"FileNotFoundError.*--update"):
        guard.read(path)
    path.write_text('{"counts": {}}')
    with pytest.raises(guard.GuardError, match="KeyError"):
        guard.read(path)
    path.write_text('{"versions": {"torch": "1.0"}, "counts": {}}')
    with pytest.raises(guard.GuardError, match=r"counted with .*1.0.*here are"):
        guard.read(path)
    guard.write(path, {"p": {"operators, calls": 3}})
    assert guard.read(path) == {"p": {"operators, calls": 3}}
