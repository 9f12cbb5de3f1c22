"""One spelling for what looks the same: Unicode, LaTeX's spaces, fonts and sizes, Markdown, and an answer's edges."""

from __future__ import annotations

import re
import unicodedata

_SMALL_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon"
    " phi chi psi omega"
)
_GREEK = {chr(0x3B1 + place): f"\\{name} " for place, name in enumerate(_SMALL_GREEK.split())}
_GREEK |= {"\u0393": "\\Gamma ", "\u0394": "\\Delta ", "\u03a3": "\\Sigma ", "\u03a6": "\\Phi ", "\u03a9": "\\Omega "}
_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d\u207b\u208b", "-"),
    **dict.fromkeys("\u00b7\u22c5\u2219\u2022", "\\cdot "),
    **dict.fromkeys("\u201c\u201d\u201e", ""),
    **dict.fromkeys("\u2032\u2019\u02b9", "'"),
    **dict.fromkeys("\u2026\u22ef", "\\ldots "),
    **dict.fromkeys("\u27e8\u2329\u3008", "("),
    **dict.fromkeys("\u27e9\u232a\u3009", ")"),
    **dict.fromkeys("\u2205\u00d8", "\\emptyset "),
    "\u00d7": "\\times ", "\u00f7": "\\div ", "\u2215": "/", "\u2044": "/", "\u2236": ":",
    "\u2264": "\\le ", "\u2a7d": "\\le ", "\u2265": "\\ge ", "\u2a7e": "\\ge ", "\u2260": "\\ne ",
    "\u2248": "\\approx ",
    "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u221e": "\\infty ", "\u221a": "\\sqrt ", "\u221b": "\\sqrt[3] ",
    "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u2216": "\\setminus ", "\u00b0": "^\\circ ",
    "\u00ba": "^\\circ ", "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u2115": "\\mathbb{N}",
    "\u211a": "\\mathbb{Q}", "\u2102": "\\mathbb{C}", "\u3002": ".", "\u3001": ",", "\u2192": "\\to ",
    "\u2220": "\\angle ", "\u25b3": "\\triangle ",
}  # fmt: skip
_UNICODE = str.maketrans(_GREEK | _SIGNS)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f]+")
_SUBSCRIPTS = re.compile("[\u2080-\u2089]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")

_TEXT_COMMANDS = re.compile(r"\\(?:text(?:rm|bf|it|sf|tt|sc|up|md|normal)?|mbox|hbox|mathrm|emph)\s*\{")
_CONSTANTS = re.compile(r"\\(?:mathrm|text|rm)\s*\{([ei])\}")
_FONT_COMMANDS = re.compile(r"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|pmb|underline|ensuremath)\s*\{")
_COLOURS = re.compile(r"\\(?:text)?color\s*(?:\[\w*\])?\{[^{}]*\}")
_SWITCHES = re.compile(
    r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|scriptstyle|limits|nolimits"
    r"|rm|bf|it|sf|tt|sl|sc|em|boldmath|bfseries|itshape|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|strut|mathstrut"
    r"|centering)(?![a-zA-Z])"
)
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:>\s]|(?:q?quad|enspace|enskip|(?:thin|med|thick|nobreak)?space)(?![a-zA-Z]))"
    r"|\\(?:[hvm]space|h?phantom|label|tag)\*?\s*\{[^{}]*\}|~"
)
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])|`")
_BOLD = re.compile(r"[\s.,;:]*\*\*((?:[^*]|\*(?!\*))+)\*\*[\s.,;:]*")
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "nicefrac": "frac", "sfrac": "frac", "leq": "le",
    "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "langle": "(", "rangle": ")",
    "lparen": "(", "rparen": ")", "lbrack": "[", "rbrack": "]", "lbrace": "\\{", "rbrace": "\\}",
    "varnothing": "emptyset",
    "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "infin": "infty", "colon": ":",
    "bar": "overline",
    "percent": "%", "ast": "cdot", "degree": "^\\circ", "pounds": "\u00a3", "euro": "\u20ac", "approxeq": "approx",
    "simeq": "approx", "land": ",", "lor": ",", "vert": "|", "lvert": "|", "rvert": "|",
    "mid": "|", "smallsetminus": "setminus", "backslash": "setminus", "prime": "'",
}  # fmt: skip
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_DEGREES = re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\^\\circ")
_WRITTEN_OUT = re.compile(
    r"(?<![\\a-zA-Z])(pi|sqrt|infinity|theta|alpha|beta|gamma|lambda|(?:arc)?(?:sin|cos|tan)|cot|log|ln|exp)(?![a-zA-Z])"
)
_BARE_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(?:\(([^()]*)\)|(\d+(?!\d|\.\d)|[a-zA-Z]|\\pi))")
_BARE_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9a-zA-Z])\s*(\{|[0-9a-zA-Z])")
_BARE_LOGARITHM = re.compile(r"\\log_\s*(\d)\s*(?=[\d\\a-zA-Z({])")
_POWER_IN_PARENTHESES = re.compile(r"\^\s*\(([^()]*)\)")
_EMPTY_BRACES = re.compile(r"(?<![a-zA-Z}\]\\])\{\s*\}")
_TEXT = re.compile(r"(\\text\{(?:[^{}]|\{[^{}]*\})*\})")
_WHOLE_TEXT = re.compile(r"\(?\s*\\text\{((?:[^{}]|\{[^{}]*\})*)\}\s*\)?")
_WHITE_SPACE = re.compile(r"\s+")
_PLAIN = re.compile(r"-?[0-9]+")


def clean(text: str) -> str:
    """The answer in one spelling: ASCII LaTeX where there is one, without looks, delimiters and punctuation at its end.

    Example: ``clean("$\\\\left(3,\\\\, \u221a2\\\\right)$.") == "(3, \\\\sqrt{2})"``
    """
    if _PLAIN.fullmatch(text):
        return text
    text = _without_looks(_from_unicode(text))
    parts = _TEXT.split(text)  # at odd places what is in \text{}, which is no mathematics
    parts[::2] = [_as_mathematics(part) for part in parts[::2]]
    return trim("".join(parts))


def trim(text: str) -> str:
    """The text without white space, punctuation at its end, and a pair of braces around all of it."""
    while True:
        before = text
        text = text.strip()
        text = text[: len(text) - _edge_behind(text)].lstrip("=:,; ").removeprefix("\\approx")
        if text.startswith("{") and text.endswith("}") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            return text


def whole_text(text: str) -> str | None:
    """What a ``\\text{}`` holds that is all of a cleaned answer, but for round brackets; None where none is."""
    whole = _WHOLE_TEXT.fullmatch(text)
    return whole[1] if whole else None


def _edge_behind(text: str) -> int:
    end = len(text)
    while end and text[end - 1] in " \n\t.,;:":
        end -= 1
    escaped = end and text[end - 1] == "\\" and (end < 2 or text[end - 2] != "\\")
    if end and text[end - 1] == "\\":
        end -= 1 if escaped else 2
    return len(text) - end


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return place == len(text) - 1
    return False


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(_raised, text)
    text = _SUBSCRIPTS.sub(_lowered, text)
    text = _VULGAR.sub(lambda found: "\\frac{{{}}}{{{}}}".format(*_plain_digits(found[0]).split("\u2044")), text)
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    return "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width characters, marks of direction


def _raised(found: re.Match[str]) -> str:
    return f"^{found[0]}" if len(found[0]) == 1 else f"^{{{found[0]}}}"


def _lowered(found: re.Match[str]) -> str:
    return f"_{found[0]}" if len(found[0]) == 1 else f"_{{{found[0]}}}"


def _plain_digits(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def _without_looks(text: str) -> str:
    text = _DECIMAL_COMMA.sub(".", _THOUSANDS.sub("", text)).replace("\\!", "")
    text = _CONSTANTS.sub(r" \1 ", text)
    text = _COLOURS.sub("", _TEXT_COMMANDS.sub(r"\\text{", text))
    text = _SWITCHES.sub(" ", _FONT_COMMANDS.sub("{", text))
    text = _SPACES.sub(" ", _DELIMITERS.sub("", text))
    text = bold[1] if (bold := _BOLD.fullmatch(text)) else text
    return _DEGREES.sub(r"^\\circ", _COMMAND.sub(_renamed, text).replace("\\%", "%"))


def _renamed(command: re.Match[str]) -> str:
    name = _RENAMED.get(command[1], command[1])
    return f"\\{name}" if name.isalpha() else name


def _as_mathematics(text: str) -> str:
    text = _WRITTEN_OUT.sub(_command_of, text.replace("...", "\\ldots ").replace("**", "^"))
    text = _BARE_ROOT.sub(lambda root: f"\\sqrt{root[1] or ''}{{{root[2] if root[2] is not None else root[3]}}}", text)
    for _ in range(2):  # a fraction in a fraction
        text = _BARE_FRACTION.sub(_braced_fraction, text)
    text = _POWER_IN_PARENTHESES.sub(r"^{\1}", _BARE_LOGARITHM.sub(r"\\log_{\1} ", text))
    return _WHITE_SPACE.sub(" ", _EMPTY_BRACES.sub("", text))


def _command_of(word: re.Match[str]) -> str:
    return f"\\{'infty' if word[1] == 'infinity' else word[1]} "


def _braced_fraction(found: re.Match[str]) -> str:
    above, below = found[1], found[2]
    return f"\\frac{above if above[0] == '{' else f'{{{above}}}'}{below if below == '{' else f'{{{below}}}'}"
