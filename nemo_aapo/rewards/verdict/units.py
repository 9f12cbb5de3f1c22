"""Units behind an answer (and currencies before it): split off, so that 12 cm is 12, but not 12 m."""

from __future__ import annotations

import re

from nemo_aapo.rewards.verdict.words import is_word

_NAMES = {
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "mm": "millimeter millimetre",
    "ft": "foot feet", "in": "inch inche", "yd": "yard", "mi": "mile", "s": "second sec", "min": "minute",
    "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr",
    "kg": "kilogram", "g": "gram gm", "mg": "milligram",
    "lb": "pound", "oz": "ounce", "ton": "tonne", "l": "liter litre", "ml": "milliliter millilitre", "gallon": "gal",
    "quart": "", "pint": "", "acre": "", "hectare": "ha", "degree": "deg \\circ", "rad": "radian",
    "dollar": "usd buck", "cent": "", "euro": "eur", "yen": "", "rupee": "rs inr", "yuan": "cny rmb", "gbp": "",
    "%": "percent pct percentage", "am": "", "pm": "", "n": "newton", "j": "joule", "w": "watt", "v": "volt",
    "hz": "hertz", "k": "kelvin", "mol": "mole",
}  # fmt: skip
_KNOWN = {alias: name for name, aliases in _NAMES.items() for alias in (name, *aliases.split())}
_MEASURES = {*_NAMES, "modulo", "degreec", "degreef"}
_CURRENCIES = {"\\$": "dollar", "\u20ac": "euro", "\u00a3": "gbp", "\u00a5": "yen", "\u20b9": "rupee"}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3", "squared": "^2", "cubed": "^3"}
_GLUED = {"cm", "mm", "km", "ft", "kg", "lb", "hr", "am", "pm"}
"""Units of two letters that are read right behind a number too; other two letters there are variables."""
_SILENT = {"unit", "of", "the", "a", "an", "per", "about", "only", "and", "each", "total", "approximately"}

_CURRENCY = re.compile(r"([-+]? *)(?:\\text\{ *)?(\\\$|[\u20ac\u00a3\u00a5\u20b9])(?: *\})? *(?=\S)")
_CURRENCY_BEHIND = re.compile(r" *(\\\$|[\u20ac\u00a3\u00a5\u20b9])$")
_SIGN = re.compile(r" *(?:(%)|\^ *\\circ *(?:\\text\{ *)?([CF]?)(?: *\})?)$")
_ONE = r"\\text\{[^{}]*\}(?: *\^ *(?:\{ *-?\d *\}|\d))?"
_IN_TEXT = re.compile(rf" *(?:\( *)?{_ONE}(?: *(?:/|\\cdot|\\times)? *{_ONE})*(?: *\))?$")
_BARE = re.compile(r"(?:(?<=[\d})])|(?<=\\pi))( *)([A-Za-z][A-Za-z./ ]*)(?: *\^ *(?:\{ *(\d) *\}|(\d)))?$")
_ORDINAL = re.compile(r"(?<=\d) *(?:\^ *)?\{? *(?:\\text\{ *)?(?:st|nd|rd|th)(?: *\})? *\}?$")
_MODULUS = re.compile(r"(?: *\( *(?:\\text\{ *)?\\?mod(?: *\})? *(\d+) *\)|\\[bp]?mod *\{? *(\d+) *\}?)$")
_NOON = re.compile(r"\b([ap])\. ?m\b")
_AROUND_POWER = re.compile(r" *\^ *")
_WORD = re.compile(r"[^\W\d_]+|%|\\circ|\^-?\d|/")


def split_unit(text: str) -> tuple[str, frozenset[str]] | None:
    """A cleaned answer without its unit, and the unit as a set of words; None where it has none.

    Example: ``split_unit("15\\\\text{ cm}^2") == ("15", frozenset({"cm^2"}))``
    """
    if found := _ORDINAL.search(text):
        return text[: found.start()], frozenset()
    if found := _CURRENCY.match(text):
        return found[1] + text[found.end() :], frozenset({_CURRENCIES[found[2]]})
    if found := _CURRENCY_BEHIND.search(text):
        return text[: found.start()], frozenset({_CURRENCIES[found[1]]})
    if found := _SIGN.search(text):
        return text[: found.start()], frozenset({"%" if found[1] else "degree" + found[2].lower()})
    if found := _MODULUS.search(text):
        return text[: found.start()], frozenset({"modulo " + next(filter(None, found.groups()))})
    if (found := _IN_TEXT.search(text)) and text[: found.start()].strip():
        return text[: found.start()], unit_of(found[0].replace("\\text", " "))
    if (found := _BARE.search(text)) and _is_unit(found[2], bool(found[1]), text[found.start() - 1]):
        return text[: found.start()], unit_of(found[2] + (f"^{found[3] or found[4]}" if found[3] or found[4] else ""))
    return None


def _is_unit(words: str, apart: bool, before: str) -> bool:
    """Whether letters behind a number name a unit rather than variables: cm and apples do, x and ab do not."""
    first, *others = re.findall(r"[a-z]+", words.casefold())
    if len(first) == 1:  # 12 m is a length, 12m is 12 times m
        rate = "/" in words and all(_singular(word) in _KNOWN for word in others)
        known = apart and before.isdigit() and first in _KNOWN
        return (first in "ap" and others == ["m"]) or (known and (rate or not others))
    known = _singular(first) in _KNOWN or first in _POWERS
    return (known and (apart or first in _GLUED or len(first) > 2)) or (apart and any(map(is_word, (first, *others))))


def unit_of(text: str) -> frozenset[str]:
    """The words of a unit in one spelling: ``square centimetres`` and ``cm^2`` are ``{"cm^2"}``."""
    words: list[str] = []
    power = ""
    text = _NOON.sub(r"\1m", text.casefold().replace("{", "").replace("}", "")).replace("mph", "miles per hour")
    text = _AROUND_POWER.sub("^", text)
    for word in _WORD.findall(text):
        if word in _POWERS and _POWERS[word] and not word.endswith("ed"):
            power = _POWERS[word]
        elif (word[0] == "^" or (word.endswith("ed") and word in _POWERS)) and words:
            words[-1] += _POWERS.get(word, word)
        elif (known := _KNOWN.get(_singular(word), _singular(word))) not in _SILENT and word != "/":
            words.append(known + power)
            power = ""
    return frozenset(words)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def same_unit(gold: frozenset[str], said: frozenset[str]) -> bool:
    """Whether two units may be one: the same, one left out, or words that share one (ways, different ways)."""
    if not gold or not said or gold == said:
        return True
    return bool(gold & said) and not (_measures(gold) | _measures(said))


def _measures(unit: frozenset[str]) -> set[str]:
    return {
        word for word in unit if word.partition("^")[0].partition(" ")[0] in {*_NAMES, "modulo", "degreec", "degreef"}
    }
