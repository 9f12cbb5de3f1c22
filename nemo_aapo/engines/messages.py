"""JSON objects between processes: strict, a line each, and typed once they have come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from nemo_aapo.config import build
from nemo_aapo.errors import ConfigError, WireError

T = TypeVar("T")


def load_object(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object as the standard has it: no NaN, no infinity.

    Raises:
        WireError: anything else.
    """
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise WireError(f"a JSON object is needed, not {type(body).__name__}")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def dump_object(message: dict[str, Any]) -> bytes:
    """One line of strict JSON, newline included."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def require_all(cls: type, fields: Any, path: str) -> None:
    """Refuse what would get a default here, as the other side need not be of the same version.

    Args:
        cls: a dataclass. path: what ``fields`` are called in the message.

    Raises:
        WireError: names the first field of ``cls`` that is not among ``fields``.
    """
    for field in dataclasses.fields(cls):
        if isinstance(fields, Mapping) and field.name not in fields:
            raise WireError(f"{path}.{field.name} is missing")


def typed(cls: type[T], fields: Mapping[str, Any]) -> T:
    """A dataclass from a message's fields.

    Raises:
        WireError: names what is missing, not known, or of another type.
    """
    try:
        return build(cls, dict(fields))
    except ConfigError as error:
        raise WireError(str(error)) from None
