"""Pairs of answers that differ, of all the kinds that a verifier can take for each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

WORDS = "ten net even odd yes no on dog god saw was Alice Bob Evelyn Navin east west red blue stop pots listen silent"


def different_pairs(count: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of answers with different values, each pair once: four of five within a kind."""
    seen: set[tuple[str, str]] = set()
    while len(seen) < count:
        kind = rng.choice(KINDS)
        a, b = kind(rng), (kind if rng.random() < 0.8 else rng.choice(KINDS))(rng)
        if a != b and (a, b) not in seen:
            seen.add((a, b))
            yield a, b


def _integer(rng):
    return str(rng.choice([rng.randint(-9999, 9999), rng.randint(10**20, 10**40)]))


def _decimal(rng):
    return rng.choice(
        [f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}1", f"0.{'0' * rng.randint(0, 9)}{rng.randint(1, 99)}1"]
    )


def _power_of_ten(rng):
    exponent = rng.choice([rng.randint(-40, -5), rng.randint(5, 40)])
    return rng.choice([f"{rng.randint(1, 9)}.{rng.randint(1, 9)} \\times 10^{{{exponent}}}", f"1.5e{exponent}"])


def _fraction(rng):
    return f"\\frac{{{rng.choice([1, 2, 4, 7])}}}{{{rng.choice([3, 5, 9, 11, 13, 15])}}}"


def _interval(rng):
    start = rng.randint(-9, 5)
    return f"{rng.choice('[(')}{start},{start + rng.randint(1, 5)}{rng.choice('])')}"


def _set(rng):
    return "\\{" + ",".join(map(str, sorted(rng.sample(range(-9, 20), rng.randint(2, 4))))) + "\\}"


def _tuple(rng):
    return "(" + ", ".join(str(rng.randint(-12, 12)) for _ in range(rng.randint(2, 4))) + ")"


def _list(rng):
    return ", ".join(map(str, sorted(rng.sample(range(30, 500), rng.randint(2, 4)))))


def _matrix(rng):
    height, width = rng.choice([(1, 2), (2, 1), (2, 2), (3, 1)])
    rows = ("&".join(str(rng.randint(-12, 12)) for _ in range(width)) for _ in range(height))
    return "\\begin{pmatrix}" + "\\\\".join(rows) + "\\end{pmatrix}"


def _numeral(rng):
    base = rng.randint(2, 9)
    return "1" + "".join(str(rng.randrange(base)) for _ in range(4)) + f"_{base}"


def _form(form: str, *choices) -> Callable[[random.Random], str]:
    return lambda rng: form % tuple(rng.choice(choice) for choice in choices)


_FEW = range(2, 10)
KINDS: list[Callable[[random.Random], str]] = [
    *(_integer, _integer, _decimal, _decimal, _power_of_ten, _power_of_ten, _fraction, _interval, _set, _tuple, _list),
    *(_matrix, _numeral),
    _form("%s:%02d \\text{ %s}", range(1, 13), range(60), ["a.m.", "p.m."]),
    _form("%s \\text{ %s}", _FEW, ["cm", "m", "km", "cm^2", "kg", "g", "seconds", "minutes", "dollars"]),
    _form("%s\\%%", range(2, 100)),
    _form("\\text{%s}", WORDS.split()),
    _form("%s", WORDS.split()),
    _form("%s", "ABCDE"),
    _form("%s^{%s}", [2, 3, 5, 6, 7], range(20, 60)),
    _form("%s\\sqrt{%s}", ["", "2", "3", "-"], [2, 3, 5, 6, 7, 10]),
    _form("%s\\pi", _FEW),
    _form("\\frac{1}{%s!}", range(20, 300)),
    _form("\\log_%s %s", [2, 3, 4], [5, 7, 11]),
    _form("%s %s %si", _FEW, "+-", _FEW),
    _form("%s \\pmod{%s}", range(4), range(5, 9)),
    _form("1:%s:%s", _FEW, _FEW),
    _form("x %s %s", ["<", ">", "\\le", "\\ge"], _FEW),
    _form("%s%s^%s+%s", _FEW, "xyn", _FEW, _FEW),
    _form("(-\\infty,-%s%s\\cup (%s,\\infty)", _FEW, ")]", _FEW),
]
