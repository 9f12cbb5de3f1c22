"""math-verify, the judge of equality between formulas, and sympy's numbers, where a difference can be measured.

math-verify limits its time with ``signal.alarm``, which works in a main thread only and cannot interrupt C code.
Its limits are switched off here, as ``RewardRunner`` kills a worker that is over time.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from nemo_aapo.rewards.verdict.numbers import is_near
from nemo_aapo.utils.libraries import importing

_DIGITS = 50
"""Digits to which numbers are evaluated. Two that agree to ``_SAME`` of them are one."""
_SAME = Fraction(1, 10**40)
_FLOATS = Fraction(1, 10**12)
"""Relative error of the floats that decimals within formulas become."""
_LETTER_AS_TEXT = re.compile(r"\\text\{\s*\(?([A-Za-z])\)?\s*\}")
_IMAGINARY = re.compile(r"(?<=\d)i(?![a-zA-Z])")  # an i right behind a digit would be another one than i alone


class _MathVerify(NamedTuple):
    parse: Callable[[str], list[Any]]
    """One formula in a box -> a list of its one meaning as sympy has it, or of none."""
    find: Callable[[str], list[Any]]
    """A text -> the meaning of the last formula or number in it, and its spelling."""
    verify: Callable[[Any, Any], bool]
    """Whether a formula, the gold one, equals the second."""


@functools.cache
def math_verify() -> _MathVerify:
    """Its functions, imported late: sympy takes most of a second."""
    with importing():
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # It warns that time limits are off, once a process; here that is on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Units are split off before (math-verify's list takes 5c for 5); a box that can't be parsed is nothing at all.
    spelling = NormalizationConfig(True, units=False, malformed_operators=True, nits=True, boxed="all")
    boxed = LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)
    strict = {"extraction_config": (boxed,), "fallback_mode": "no_fallback", "extraction_mode": "first_match"}
    loose = {"extraction_config": (replace(boxed, boxed_match_priority=-1), ExprExtractionConfig())}
    return _MathVerify(
        functools.partial(parse, parsing_timeout=None, **strict),
        functools.partial(parse, parsing_timeout=None, **loose),
        functools.partial(verify, timeout_seconds=None),
    )


@functools.lru_cache(maxsize=4096)
def parse_formula(latex: str) -> Any | None:
    """A cleaned formula as sympy's expression, or None if it is none, or undefined as 1/0 is."""
    from sympy import nan, zoo

    spelled = _IMAGINARY.sub(" i", _LETTER_AS_TEXT.sub(r"\1", latex))
    found = next(iter(math_verify().parse(f"\\boxed{{{spelled}}}")), None)
    return None if found is nan or found is zoo else found


def same_formula(gold: Any, said: Any) -> bool:
    """Whether two of sympy's expressions are equal.

    Numbers are compared by value: exactly, or where a decimal is in one of them as ``numbers.is_near`` does, as
    math-verify takes all below 1e-6 for zero. Formulas with different values at a point are different. Of everything
    else math-verify is the judge.
    """
    if _is_number(gold) and _is_number(said):
        return _same_value(gold, said)
    return not _differ_at_a_point(gold, said) and math_verify().verify(gold, said)


def _is_number(expression: Any) -> bool:
    return bool(getattr(expression, "is_number", False)) and getattr(expression, "is_finite", None) is not False


def _same_value(gold: Any, said: Any) -> bool:
    from sympy import Float, Rational

    gold, said = gold.doit(), said.doit()
    if isinstance(gold, Rational) and isinstance(said, Rational):
        return bool(gold == said)
    a, b = _value(gold), _value(said)
    if a is None or b is None:
        return math_verify().verify(gold, said)
    error, size = _size(a[0] - b[0], a[1] - b[1]), _size(*a)
    if error <= _SAME * size:
        return True
    if not (gold.has(Float) or said.has(Float)):
        return False
    return error <= _FLOATS * size or (_is_zero(said) == _is_zero(gold) and is_near(size, size + error))


def _is_zero(number: Any) -> bool:
    return number.is_zero is True


def _value(number: Any) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part to ``_DIGITS`` digits; None where they can't be had."""
    from sympy import Rational

    try:
        parts = [Rational(part) for part in number.evalf(_DIGITS).as_real_imag()]
    except Exception:
        return None
    return Fraction(int(parts[0].p), int(parts[0].q)), Fraction(int(parts[1].p), int(parts[1].q))


def _size(real: Fraction, imaginary: Fraction) -> Fraction:
    return max(abs(real), abs(imaginary))


def _differ_at_a_point(gold: Any, said: Any) -> bool:
    """Whether two formulas with variables, both with values, have different ones where each variable has its number."""
    from sympy import Expr, Rational

    if not (isinstance(gold, Expr) and isinstance(said, Expr)) or gold.is_Symbol or said.is_Symbol:
        return False  # of a symbol math-verify also compares the letters
    names = sorted(gold.free_symbols | said.free_symbols, key=str)
    point = {name: Rational(7 + 4 * place, 5 + place) for place, name in enumerate(names)}
    try:
        a, b = _value(gold.subs(point)), _value(said.subs(point))
    except Exception:
        return False
    if a is None or b is None:
        return False
    return _size(a[0] - b[0], a[1] - b[1]) > Fraction(1, 10**5) * max(_size(*a), _size(*b))
