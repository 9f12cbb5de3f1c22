"""Who sends what to whom, and the number that proves it: the same whatever the layouts, or an error by name."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from nemo_aapo.engines.collective.digest import _sums_of
from nemo_aapo.engines.collective.plan import Box, plan, within
from nemo_aapo.errors import WeightsError
from nemo_aapo.mcore.state import WeightPart

SHAPES = {"one": (4, 12, 6), "two": (9,), "three": (5, 8)}


def cut(chance: random.Random, ranks: int) -> list[list[Box]]:
    """The boxes of each rank: every weight is cut along each axis somewhere, and some parts are held by several."""
    held: list[list[Box]] = [[] for _ in range(ranks)]
    for key, shape in SHAPES.items():
        edges = [sorted({0, size, *chance.choices(range(size), k=chance.randint(0, 2))}) for size in shape]
        for spans in itertools.product(*(itertools.pairwise(edge) for edge in edges)):
            box = Box(key, tuple(a for a, _ in spans), tuple(b - a for a, b in spans), "float32")
            for rank in chance.sample(range(ranks), chance.choice((1, 1, ranks))):
                held[rank].append(box)
    return held


def test_every_part_of_the_receivers_is_filled_once_with_what_the_senders_hold_whatever_the_cuts():
    chance = random.Random(0)
    whole = {key: np.arange(np.prod(shape)).reshape(shape) + 1 for key, shape in SHAPES.items()}
    for number in range(200):
        senders, receivers = cut(chance, chance.randint(1, 4)), cut(chance, chance.randint(1, 3))
        got = [{box: np.zeros(box.shape, int) for box in boxes} for boxes in receivers]
        for move in plan(senders, receivers, server=number):
            source = next(b for b in senders[move.sender] if b.key == move.box.key and holds(b, move.box))
            target = next(b for b in receivers[move.receiver] if b.key == move.box.key and holds(b, move.box))
            part = whole[source.key][within(source, Box(source.key, (0,) * len(source.start), (), ""))]
            got[move.receiver][target][within(move.box, target)] += part[within(move.box, source)]
        for boxes in got:
            for box, values in boxes.items():
                zero = Box(box.key, (0,) * len(box.start), (), "")
                np.testing.assert_array_equal(values, whole[box.key][within(box, zero)])


def holds(outer: Box, inner: Box) -> bool:
    return all(
        a <= b and b + n <= a + m for a, m, b, n in zip(outer.start, outer.shape, inner.start, inner.shape, strict=True)
    )


def test_copies_take_turns_so_that_all_ranks_of_the_trainer_send():
    box = Box("w", (0,), (4,), "float32")
    assert {plan([[box]] * 3, [[box]], server)[0].sender for server in range(3)} == {0, 1, 2}


@pytest.mark.parametrize(
    "box", [Box("w", (2,), (4,), "float32"), Box("w", (0,), (4,), "half"), Box("x", (0,), (4,), "half")]
)
def test_what_the_trainer_does_not_hold_is_refused_by_name(box):
    with pytest.raises(WeightsError, match=f"key='{box.key}'.*another kind or precision"):
        plan([[Box("w", (0,), (4,), "float32")]], [[box]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_digest_is_that_of_any_cut_and_changes_with_every_bit_place_and_name(dtype):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 40, 24, generator=generator).to(dtype)

    def sums(key: str, start: tuple[int, ...], tensor: torch.Tensor) -> list[int]:
        return _sums_of(WeightPart(key, start, tensor, True)).tolist()

    def digest(*parts: list[int]) -> list[int]:
        return [sum(column) % 2**32 for column in zip(*parts, strict=True)]

    wanted = digest(sums("w", (0, 0, 0), whole))
    for rows, columns in ((40, 24), (7, 24), (40, 5), (3, 4)):
        cuts = itertools.product(range(2), range(0, 40, rows), range(0, 24, columns))
        parts = [sums("w", at, whole[at[0] : at[0] + 1, at[1] : at[1] + rows, at[2] : at[2] + columns]) for at in cuts]
        assert digest(*parts) == wanted
    others = {tuple(digest(sums("v", (0, 0, 0), whole))), tuple(digest(sums("w", (0, 1, 0), whole))), tuple(wanted)}
    for place in ((0, 0, 0), (1, 39, 23), (0, 17, 5)):
        changed = whole.clone()
        changed.view(torch.uint8)[place[0], place[1], place[2] * whole.element_size()] ^= 1
        others.add(tuple(digest(sums("w", (0, 0, 0), changed))))
    swapped = whole.clone()
    swapped[:, [3, 4]] = whole[:, [4, 3]]
    others.add(tuple(digest(sums("w", (0, 0, 0), swapped))))
    assert len(others) == 7
