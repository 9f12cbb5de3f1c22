"""JSON in which no text can end the element that holds it."""

from __future__ import annotations

import json

_INERT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def inert_json(value: object) -> str:
    """JSON that may stand in a script element, whatever texts it holds: none of them can end it, and half a surrogate
    pair, which UTF-8 has no code for, is an escape.

    >>> inert_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _INERT.items():
        text = text.replace(character, escape)
    return text.encode("utf-8", "backslashreplace").decode()
