"""Plain numbers, read exactly: integers of any size, decimals, fractions, mixed numbers, powers of ten, 0.(6), 3:4."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

SIX_DECIMALS = Fraction(5, 10**7)
FIVE_DIGITS = Fraction(1, 10**5)
"""A decimal stands for the number that it was rounded from if it differs by at most both: of 1, and of the number."""

_MOST_ZEROS = 1000
"""Largest power of ten that is written out; beyond it an answer is a formula."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?![\d])"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIGNED = re.compile(r"([-+]?) *(.+)", re.DOTALL)
_NUMBER = re.compile(_DECIMAL)
_ARGUMENT = rf"\{{ *([-+]? *{_DECIMAL}) *\}}"
_FRACTION = re.compile(rf"(?:({_DIGITS}) *)?\\frac *{_ARGUMENT} *{_ARGUMENT}")
_SLASHED = re.compile(rf"(?:(\d+) +)?({_DECIMAL}) *[/:] *({_DECIMAL})")
# 4.5e33 and 3e-12 are powers of ten; 2e-3 may as well be 2e less 3.
_SCIENTIFIC = re.compile(r"(\d*\.\d+|\d+\.?)[eE]([-+]?\d+)")
_TIMES_POWER = re.compile(rf"(?:({_DECIMAL}) *(?:\\times|\\cdot|\*|x) *)?10 *\^ *(?:\{{ *([-+]? *\d+) *\}}|([-+]?\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\overline *\{ *(\d+) *\}|\((\d+)\)|\\dot *\{? *(\d) *\}?|(\d)\6\6+ *\\ldots)")


class Number(NamedTuple):
    """A number as it was written.

    Example: ``read_number("-3\\\\frac{1}{2}") == Number(Fraction(-7, 2), rounded=False)``
    """

    value: Fraction
    rounded: bool
    """Whether it has a decimal point, so that it may stand for a number near by."""


def read_number(text: str) -> Number | None:
    """The number that a cleaned answer is, or None if it is something else."""
    sign, magnitude = _SIGNED.fullmatch(text or " ").groups()  # type: ignore[union-attr]
    number = _unsigned(magnitude)
    if number is None:
        return None
    return number._replace(value=-number.value) if sign == "-" else number


def read_short_power(text: str) -> Number | None:
    """The power of ten that 2e-3 is, if it is not 2e less 3."""
    found = _SCIENTIFIC.fullmatch(text)
    return _times_power_of_ten(found[1], found[2]) if found else None


def _unsigned(text: str) -> Number | None:
    if _NUMBER.fullmatch(text):
        return Number(_exact(text), "." in text)
    if found := _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text):
        return _quotient(*found.groups())
    if (found := _SCIENTIFIC.fullmatch(text)) and ("." in found[1] or len(found[2].lstrip("+-")) > 1):
        return _times_power_of_ten(found[1], found[2])
    if found := _TIMES_POWER.fullmatch(text):
        return _times_power_of_ten(found[1] or "1", found[2] or found[3])
    if found := _REPEATING.fullmatch(text):
        return Number(_repeating(found[1], found[2], next(filter(None, found.groups()[2:]))), rounded=False)
    return None


def _exact(digits: str) -> Fraction:
    return Fraction(digits.translate(str.maketrans("", "", ", ")))


def _quotient(whole: str | None, above: str, below: str) -> Number | None:
    divisor = _exact(below)
    if divisor == 0:
        return None
    return Number(_exact(whole or "0") + _exact(above) / divisor, "." in above + below)


def _times_power_of_ten(digits: str, exponent: str) -> Number | None:
    power = int(exponent.replace(" ", "")) if len(exponent) < 9 else _MOST_ZEROS + 1
    return Number(_exact(digits) * Fraction(10) ** power, "." in digits) if abs(power) <= _MOST_ZEROS else None


def _repeating(whole: str, before: str, period: str) -> Fraction:
    shown = Fraction(int((whole + before) or "0"), 10 ** len(before))
    return shown + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(before))


def same_number(gold: Number, said: Number) -> bool:
    """Whether two numbers are equal, or one is a decimal that the other, which is none, was rounded to."""
    return gold.value == said.value or (gold.rounded != said.rounded and is_near(gold.value, said.value))


def is_near(gold: Fraction, said: Fraction) -> bool:
    """Whether two numbers that are not zero agree to six decimals and to five digits."""
    error = abs(gold - said)
    return bool(gold and said) and error <= SIX_DECIMALS and error <= FIVE_DIGITS * abs(gold)
