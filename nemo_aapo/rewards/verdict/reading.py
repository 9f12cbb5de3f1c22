"""What an answer means: its cleaned text as a number, a quantity, a list, an interval, a relation, words, or a formula.

Each kind has a record. An answer that is none of them, is so only in part, or goes on in dots, reads as nothing.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemo_aapo.rewards.verdict.mathematics import parse_formula
from nemo_aapo.rewards.verdict.numbers import Number, read_number, read_short_power
from nemo_aapo.rewards.verdict.text import clean, trim, whole_text
from nemo_aapo.rewards.verdict.tokens import (
    SIGNS,
    UnreadableError,
    commas,
    enclosed,
    has_sign,
    is_name,
    parts,
    spelled,
    split,
    top_level,
)
from nemo_aapo.rewards.verdict.units import split_unit
from nemo_aapo.rewards.verdict.words import read_words


@dataclass(frozen=True)
class Quantity:
    """A value with its unit: 15 cm^2, 5 dollars, 12 %, 3 p.m., 4 (mod 7)."""

    value: Reading
    unit: frozenset[str]


@dataclass(frozen=True)
class Numeral:
    """A number in a base that is not ten, which counts: 1011_2 is neither 1011_3 nor 11."""

    digits: str
    base: str


@dataclass(frozen=True)
class Time:
    """A time of the day, 3:30, or a date in digits, as it is written."""

    written: str


@dataclass(frozen=True)
class Words:
    """Words in one spelling, or a text with numbers in it, such as a date."""

    letters: str


@dataclass(frozen=True)
class Collection:
    """Several answers, a set, a pair, a vector, an interval, a ratio of three parts, or a union of intervals."""

    brackets: str
    """``""`` for a bare list, else its brackets: ``"()"``, ``"[)"``, ``"{}"``, and so on; ``":"`` and ``"U"``."""
    items: tuple[Reading, ...]
    latex: str


@dataclass(frozen=True)
class Matrix:
    """The cells of a matrix or a column vector."""

    rows: tuple[tuple[Reading, ...], ...]


@dataclass(frozen=True)
class Relation:
    """An equation, an inequality, or a chain of them."""

    sides: tuple[Reading, ...]
    names: tuple[str, ...]
    """Of each side its text if it is a name (x, f(x), \\\\angle A), else ``""``."""
    signs: tuple[str, ...]
    latex: str


@dataclass(frozen=True)
class Formula:
    """Everything else, for math-verify."""

    latex: str


Reading = Number | Quantity | Numeral | Time | Words | Collection | Matrix | Relation | Formula

_SPOKEN = re.compile(r"(?!(?:and|or)\b)[^\W\d_]+")
_LEAD = re.compile(r"\\text\{[^{}]*(?:\b(?:is|are)|[=:])\s*\}\s*")
_ONE_OR_SEVERAL = re.compile(r"\d{1,3}(?:,\d{3})+")
_AND = re.compile(r",?\s*(?:\\text\{\s*(?:,|,?\s*(?:and|or)\s*,?)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*,?")
_CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d(?::[0-5]\d)?)")
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{4}")
_NUMERAL = re.compile(
    r"([-+]?) *\(? *(?:\\text\{ *)?([0-9][0-9A-Za-z]*|[0-9A-Z]{2,}|[A-F])(?: *\})? *\)? *_ *(?:\{ *(\d+) *\}|(\d))"
)
_BASE_IN_WORDS = re.compile(
    r"_ *\{? *\\text\{ *(?:base )?(\w+) *\} *\}?$|(?:\\text\{)? *(?:in )?\bbase *\}? *(\w+) *\}?$"
)
_BASE_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {name: str(base) for base, name in enumerate(_BASE_NAMES, start=2)}
_CHOICE = re.compile(r"(?:\\text\{ *\(([A-J])\) *\}|\(([A-J])\)(?= )) *(?:\d|[a-z]{3}|\\(?:text|frac|sqrt|\$))")
_MATRIX = re.compile(r"\\begin *\{([pbB]?matrix|array)\} *(?:\{[lcr| ]*\})?(.*)\\end *\{\1\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_PIECES_OF_NUMBERS = re.compile(r"[\d.)\]]\s+\.?\d|\d\.\d*\.|\.\s*$")


@functools.lru_cache(maxsize=4096)
def read(answer: str) -> tuple[Reading, ...]:
    """What an answer may mean, the likeliest first; empty for what can't be read.

    Only 300,400 (one number or two), 3:45 (a time or a ratio) and 2e-3 (in which e is a number or not) mean several.
    """
    return _read(clean(answer))


def _read(text: str) -> tuple[Reading, ...]:
    number = read_number(text)
    several = [read_number(part) for part in text.split(",")] if number and _ONE_OR_SEVERAL.fullmatch(text) else []
    meanings = (_time(text), number, Collection("", tuple(filter(None, several)), text) if several else None)
    if any(meanings):
        return tuple(filter(None, meanings))
    try:
        return tuple(filter(None, (_one(text), read_short_power(text))))
    except (UnreadableError, RecursionError):
        return ()


def _one(text: str, spoken: bool = False) -> Reading:
    """The likeliest reading of a part of an answer."""
    text = trim(_LEAD.sub("", text, count=1) if text.startswith("\\text") else text)
    if (whole := whole_text(text)) is not None:
        return _one(clean(whole), spoken=True)
    if spoken and not any(map(str.isdigit, text)) and any(len(run) > 1 for run in _SPOKEN.findall(text)):
        return Words(words) if (words := read_words(text, spoken)) is not None else _formula(text)
    if number := _time(text) or _number(text):
        return number
    for reader in _READERS:
        if reading := reader(text):
            return reading
    if (words := read_words(text, spoken)) is not None:
        return Words(words)
    return _formula(text)


def _number(text: str) -> Number | Quantity | None:
    """A plain number, with a unit or not: the commas of $1,234 part no list."""
    if number := read_number(text):
        return number
    found = split_unit(text)
    number = read_number(trim(found[0])) if found and not _time(trim(found[0])) else None
    return Quantity(number, found[1]) if found and number and found[1] else number


def _formula(text: str) -> Formula:
    if not text or _PIECES_OF_NUMBERS.search(text) or parse_formula(text) is None:
        raise UnreadableError
    return Formula(text)


# ---------------------------------------------------------------- the kinds, each None for another one's text


def _dots(text: str) -> None:
    if "\\ldots" in text:
        raise UnreadableError


def _choice(text: str) -> Formula | None:
    """The letter of ``(C) 12``, a choice with what it says."""
    found = _CHOICE.match(text)
    return Formula(found[1] or found[2]) if found else None


def _time(text: str) -> Time | None:
    if clock := _CLOCK.fullmatch(text):
        return Time(f"{int(clock[1])}:{clock[2]}")
    date = _DATE.fullmatch(text)
    return Time("-".join(str(int(number)) for number in re.split(r"\D", text))) if date else None


def _numeral(text: str) -> Reading | None:
    text = _BASE_IN_WORDS.sub(lambda base: f"_{{{_BASES.get(w := base[1] or base[2], w)}}}", text)
    found = _NUMERAL.fullmatch(text)
    if found is None:
        return None
    digits, base = found[2].upper().lstrip("0") or "0", found[3] or found[4]
    if base == "10":
        return read_number(found[1] + digits)
    if digits.isalpha() and (int(base) <= 10 or any(int(d, 36) >= int(base) for d in digits)):
        return None  # a variable with an index
    return Numeral(found[1].replace("+", "") + digits, base)


def _list(text: str) -> Reading | None:
    text = _AND.sub(",", text)
    if not commas(text):
        return None
    first, *others = parts(text)
    name, *values = split(first, {"=", "\\in"})
    if len(values) == 1 and is_name(name) and not any(map(has_sign, others)):  # n = 2, 3, 4
        several = Collection("", tuple(map(_one, (*values, *others))), text)
        return Relation((Words(spelled(name)), several), (spelled(name), ""), ("=",), text)
    return Collection("", tuple(itertools.chain.from_iterable(map(_each, (first, *others)))), text)


def _each(part: str) -> Sequence[Reading]:
    """A part of a list; ``\\pm 1`` is two."""
    reading = _one(part)
    both = isinstance(reading, Collection) and not reading.brackets and _PLUS_MINUS.search(part)
    return reading.items if isinstance(reading, Collection) and both else (reading,)


def _relation(text: str) -> Reading | None:
    if not has_sign(text):
        return None
    sides, signs = list(split(text, SIGNS)), [token for token, _ in top_level(text) if token in SIGNS]
    if "\\approx" in signs:  # 1/3 = 0.33..., about 0.3: what is exact counts, unless it is only a name
        exact = max(signs.index("\\approx"), int(is_name(sides[0])))
        sides, signs = sides[: exact + 1], ["=" if sign == "\\approx" else sign for sign in signs[:exact]]
    if len(sides) == 1:
        return _one(sides[0])
    names = tuple(spelled(side) if is_name(side) else "" for side in sides)
    return Relation(tuple(map(_side, sides)), names, tuple(signs), text)


def _side(text: str) -> Reading:
    try:
        return _one(text)
    except UnreadableError:
        if is_name(text):
            return Words(spelled(text))
        raise


def _both_signs(text: str) -> Collection | None:
    if not _PLUS_MINUS.search(text):
        return None
    both = [trim(_signed(text, {"pm": plus, "mp": minus})) for plus, minus in ("+-", "-+")]
    return Collection("", tuple(_one(part.removeprefix("+")) for part in both), text)


def _signed(text: str, signs: Mapping[str, str]) -> str:
    return _PLUS_MINUS.sub(lambda command: signs[command[1]], text)


def _group(text: str) -> Reading | None:
    """What one pair of brackets around all of it holds."""
    brackets, inside = enclosed(text)
    if not brackets:
        return None
    if not inside:
        return Formula("\\emptyset") if brackets == "{}" else None
    items = list(map(_one, parts(inside))) if commas(inside) else _lone(inside, brackets)
    if items is None:
        return None
    return items[0] if len(items) == 1 and brackets != "{}" else Collection(brackets, tuple(items), text)


def _lone(inside: str, brackets: str) -> list[Reading] | None:
    if brackets in ("[)", "(]") or (brackets == "{}" and ("|" in inside or ":" in inside)):
        return None
    found = _one(inside)
    return list(found.items) if isinstance(found, Collection) and not found.brackets else [found]


def _union(text: str) -> Collection | None:
    parts = list(split(text, {"\\cup"}))
    return Collection("U", tuple(_one(part) for part in parts), text) if len(parts) > 1 else None


def _ratio(text: str) -> Collection | None:
    parts = list(split(text, {":"}))
    if len(parts) < 2 or any(has_sign(part) for part in parts):
        return None
    return Collection(":", tuple(_one(part) for part in parts), text)


def _matrix(text: str) -> Matrix | None:
    found = _MATRIX.fullmatch(text)
    if found is None or "\\begin" in found[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found[2]) if row.strip()]
    return Matrix(tuple(tuple(_one(cell) for cell in row.split("&")) for row in rows))


def _quantity(text: str) -> Quantity | Reading | None:
    found = split_unit(text)
    if found is None:
        return None
    value = _one(found[0])
    if isinstance(value, Words | Numeral):
        return None
    return Quantity(value, found[1]) if found[1] else value


_READERS: tuple[Callable[[str], Reading | None], ...] = (
    _dots, _choice, _numeral, _list, _relation, _both_signs, _group, _matrix, _union, _quantity, _ratio,
)  # fmt: skip
