"""Whether two readings are one answer: kind by kind, and of formulas by math-verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_aapo.rewards.verdict.mathematics import parse_formula, same_formula
from nemo_aapo.rewards.verdict.numbers import Number, same_number
from nemo_aapo.rewards.verdict.reading import (
    Collection,
    Formula,
    Matrix,
    Numeral,
    Quantity,
    Reading,
    Relation,
    Time,
    Words,
)
from nemo_aapo.rewards.verdict.units import same_unit

_PERCENT = frozenset({"%"})
_HALVES_OF_A_DAY = frozenset({"am", "pm"})
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_OF_WORDS = (Words, Numeral, Time)


def same_answer(gold: Sequence[Reading], said: Sequence[Reading]) -> bool:
    """Whether an answer, by what it may mean, is the gold one.

    Of several meanings the first counts for which the other answer has one of its kind: 300,400 is a number beside
    300400, and two numbers beside 300, 400 with a space.
    """
    for meaning in gold:
        for other in said:
            if type(meaning) is type(other):
                return same(meaning, other)
    return any(same(meaning, other) for meaning in gold for other in said)


def same(gold: Reading, said: Reading) -> bool:
    """Whether two readings are one answer."""
    if isinstance(gold, Quantity) or isinstance(said, Quantity):
        return _same_quantity(gold, said)
    if isinstance(gold, Relation) or isinstance(said, Relation):
        return _same_relation(gold, said)
    if isinstance(gold, Collection) or isinstance(said, Collection):
        return _same_collection(gold, said)
    if isinstance(gold, Number) and isinstance(said, Number):
        return same_number(gold, said)
    if isinstance(gold, _OF_WORDS) or isinstance(said, _OF_WORDS):
        return gold == said or (
            isinstance(gold, Words | Formula) and isinstance(said, Words | Formula) and _spelled_alike(gold, said)
        )
    if isinstance(gold, Matrix) and isinstance(said, Matrix):
        return [len(row) for row in gold.rows] == [len(row) for row in said.rows] and all(
            _all_same(*rows) for rows in zip(gold.rows, said.rows, strict=True)
        )
    return _same_by_formula(gold, said)


def _spelled_alike(gold: Words | Formula, said: Words | Formula) -> bool:
    """``ab`` may be a word where the other answer is one."""
    a, b = (x.letters if isinstance(x, Words) else x.latex.replace(" ", "").casefold() for x in (gold, said))
    return a == b


def _same_quantity(gold: Reading, said: Reading) -> bool:
    (a, unit), (b, other) = map(_with_unit, (gold, said))
    if (unit == _PERCENT) != (other == _PERCENT) and not (unit and other):
        return same(a, b) or same(*(_hundredth(x) if u else x for x, u in ((a, unit), (b, other))))
    if (unit | other) & _HALVES_OF_A_DAY:
        a, b = _on_the_clock(a), _on_the_clock(b)
    return same_unit(unit, other) and same(a, b)


def _on_the_clock(reading: Reading) -> Reading:
    """9 p.m. is 9:00 p.m."""
    if isinstance(reading, Number) and reading.value.denominator == 1:
        return Time(f"{reading.value.numerator}:00")
    return reading


def _with_unit(reading: Reading) -> tuple[Reading, frozenset[str]]:
    if isinstance(reading, Quantity):
        return reading.value, reading.unit
    if isinstance(reading, Relation) and len(reading.sides) == 2 and isinstance(value := _value_of(reading), Quantity):
        return value.value, value.unit
    return reading, frozenset()


def _hundredth(reading: Reading) -> Reading:
    if isinstance(reading, Number):
        return Number(reading.value / 100, reading.rounded)
    return Formula(f"\\frac{{{reading.latex}}}{{100}}") if isinstance(reading, Formula) else reading


# ---------------------------------------------------------------- equations and inequalities


def _same_relation(gold: Reading, said: Reading) -> bool:
    if isinstance(gold, Relation) and isinstance(said, Relation):
        return _same_relations(gold, said)
    if isinstance(gold, Relation):
        value = _value_of(gold)
        if value is not None:
            return same(value, said)
        return isinstance(said, Formula | Collection) and _same_by_formula(gold, said)
    assert isinstance(said, Relation)
    value = _value_of(said)
    # 2 + 3 = 5 says 5; a relation that gives no value to a name may still be math-verify's interval.
    if value is None and set(said.signs) == {"="}:
        value = said.sides[-1]
    if value is not None:
        return same(gold, value)
    if isinstance(gold, Collection) and _is_interval(gold):
        return _same_by_formula(said, gold)  # math-verify takes x < 5 for an interval only if it comes first
    return isinstance(gold, Formula | Collection) and _same_by_formula(gold, said)


def _is_interval(collection: Collection) -> bool:
    """Whether it can be nothing else: (1, 2) may be a pair, and [1, 2] a list."""
    return collection.brackets in ("[)", "(]", "U") or "\\infty" in collection.latex


def _value_of(relation: Relation) -> Reading | None:
    """What ``x = 5``, ``5 = x`` and ``x \\\\in [0, 1]`` give to a name, or the end of ``x = 2 + 3 = 5``; else None."""
    if not set(relation.signs) <= {"=", "\\in", "\\equiv"}:
        return None
    values = [side for side, name in zip(relation.sides, relation.names, strict=True) if not name]
    if len(values) == len(relation.sides):
        return None
    return values[-1] if values else relation.sides[-1]


def _same_relations(gold: Relation, said: Relation) -> bool:
    if len(gold.sides) > 2 and _value_of(gold) is not None and _value_of(said) is not None:
        return _same_names(gold, said) and same(_value_of(gold), _value_of(said))  # type: ignore[arg-type]
    mirrored = _mirrored(said)
    if _same_sides(gold, said) or (mirrored is not None and _same_sides(gold, mirrored)):
        return True
    if _value_of(gold) is not None and _value_of(said) is not None and _same_names(gold, said):
        return same(_value_of(gold), _value_of(said))  # type: ignore[arg-type]
    if _bounds(gold) and _bounds(said):
        return False  # numbers that differ: math-verify takes small differences for none
    return _same_by_formula(gold, said)


def _same_names(gold: Relation, said: Relation) -> bool:
    first, second = (next(filter(None, relation.names), "") for relation in (gold, said))
    return first == second


def _same_sides(gold: Relation, said: Relation) -> bool:
    return gold.signs == said.signs and _all_same(gold.sides, said.sides)


def _mirrored(relation: Relation) -> Relation | None:
    if not all(sign in _MIRRORED for sign in relation.signs):
        return None
    signs = tuple(_MIRRORED[sign] for sign in reversed(relation.signs))
    return Relation(relation.sides[::-1], relation.names[::-1], signs, relation.latex)


def _bounds(relation: Relation) -> bool:
    """Whether it only bounds a name by numbers: 1 < x < 2."""
    return sum(map(bool, relation.names)) == 1 and all(
        name or isinstance(side, Number) for side, name in zip(relation.sides, relation.names, strict=True)
    )


# ---------------------------------------------------------------- lists, sets, pairs, intervals


def _same_collection(gold: Reading, said: Reading) -> bool:
    if not (isinstance(gold, Collection) and isinstance(said, Collection)):
        return _same_as_one(gold, said)
    if "U" in (gold.brackets, said.brackets):
        alike = gold.brackets == said.brackets and _same_set(gold.items, said.items)
        return alike or _same_by_formula(gold, said)
    if {"", "{}"} >= {gold.brackets, said.brackets}:
        compared = _all_same if _named_once(gold.items, said.items) else _same_set
        return compared(gold.items, said.items)
    if gold.brackets == said.brackets or _both_ordered(gold, said):
        return _all_same(gold.items, said.items) or (gold.brackets == ":" and _proportional(gold.items, said.items))
    return False


def _same_as_one(gold: Reading, said: Reading) -> bool:
    """Whether a collection is the same as what is none: a list of one thing, or math-verify's real numbers."""
    collection, one = (gold, said) if isinstance(gold, Collection) else (said, gold)
    assert isinstance(collection, Collection)
    if collection.brackets in ("", "{}"):
        return _same_set(*(x.items if isinstance(x, Collection) else (x,) for x in (gold, said)))
    return isinstance(one, Formula) and _same_by_formula(gold, said)


def _both_ordered(a: Collection, b: Collection) -> bool:
    """A bare list may be a pair or vector; three and more in square brackets are what they are in round ones."""
    kinds = {a.brackets, b.brackets}
    return kinds in ({"", "()"}, {"", "[]"}) or (kinds == {"()", "[]"} and len(a.items) > 2)


def _named_once(gold: Sequence[Reading], said: Sequence[Reading]) -> bool:
    """Whether only one side says which value is whose: 1, 2 beside x = 1, y = 2."""
    names = [{n for item in items if isinstance(item, Relation) for n in item.names if n} for items in (gold, said)]
    return sorted(map(bool, names)) == [False, True] and max(map(len, names)) > 1


def _all_same(gold: Sequence[Reading], said: Sequence[Reading]) -> bool:
    return len(gold) == len(said) and all(same(a, b) for a, b in zip(gold, said, strict=True))


def _same_set(gold: Sequence[Reading], said: Sequence[Reading]) -> bool:
    wanted, left = list(dict.fromkeys(gold)), list(dict.fromkeys(said))
    if len(wanted) != len(left):
        return False
    for item in wanted:
        match = next((other for other in left if same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _proportional(gold: Sequence[Reading], said: Sequence[Reading]) -> bool:
    numbers = [[item.value for item in items if isinstance(item, Number)] for items in (gold, said)]
    if len(numbers[0]) != len(gold) or len(numbers[1]) != len(said) or len(gold) != len(said):
        return False
    first, other = numbers
    return all(a * other[0] == b * first[0] for a, b in zip(first, other, strict=True)) and any(first) == any(other)


# ---------------------------------------------------------------- formulas


def _same_by_formula(gold: Reading, said: Reading) -> bool:
    a, b = _expression(gold), _expression(said)
    if a is None or b is None:
        return False
    if isinstance(gold, Formula) and isinstance(said, Formula) and gold.latex.count("'") != said.latex.count("'"):
        return False  # math-verify leaves primes out
    return same_formula(a, b)


def _expression(reading: Reading) -> Any | None:
    if isinstance(reading, Number):
        from sympy import Float, Rational

        exact = Rational(reading.value.numerator, reading.value.denominator)
        return Float(exact, 60) if reading.rounded else exact
    return parse_formula(reading.latex) if isinstance(reading, Formula | Collection | Relation) else None
