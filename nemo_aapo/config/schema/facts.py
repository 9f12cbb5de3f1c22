"""What is known of a setting, once: it is metadata of the setting's field, and everything else is derived from it.

Refusals of values out of range, ``--help``, the comments in ``conf/``, the settings reference and the digest of a run
all read it here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from typing_extensions import dataclass_transform

T = TypeVar("T")
_FACTS = "facts"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one setting besides its name and type."""

    meaning: str
    """What people read in ``conf/``, in ``--help`` and in the reference; one line."""
    decides: bool | tuple[str, str] | Literal["set"]
    """Whether it decides the result of a run, so that a run can't go on with another value. ``(key, value)``: only
    where that other setting has that value. ``"set"``: only where it is neither null nor false nor 0 nor
    empty, so that runs from before there was such a setting go on."""
    minimum: float | None = None
    """The smallest value."""
    above: float | None = None
    """What the value must be greater than."""
    maximum: float | None = None
    """The largest value."""
    below: float | None = None
    """What the value must be less than."""
    sane: float | None = None
    """The largest magnitude, where no maximum is meant: beyond it a value can only be a mistake, and would do harm."""
    main: bool = False
    """Whether ``--help`` shows it."""
    path: bool = False
    """Whether its value is a path, several, or mappings that hold some; none can be empty, all may begin with ``~``."""

    @property
    def limits(self) -> str:
        """The range of values in words: ``at least 1``, ``in (0, 1]``; empty without limits."""
        least, most = _either(self.minimum, self.above), _either(self.maximum, self.below)
        if least is not None and most is not None:
            left, right = "[" if self.minimum is not None else "(", "]" if self.maximum is not None else ")"
            return f"in {left}{least}, {most}{right}"
        if least is not None:
            return f"at least {least}" if self.minimum is not None else f"above {least}"
        return "" if most is None else f"at most {most}" if self.maximum is not None else f"below {most}"

    def allow(self, value: float) -> bool:
        """Whether a number lies within the limits."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def complaint(self, value: object) -> str:
        """What is wrong with a value, or with one of several, as the end of ``must be ...``; empty if nothing is."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not self.allow(number):
                return self.limits
            if isinstance(number, int | float) and self.sane is not None and abs(number) > self.sane:
                return f"at most {self.sane:,}" if number > 0 else f"at least {-self.sane:,}"
        return ""


@dataclass(frozen=True)
class Setting:
    """One setting of a schema."""

    key: str
    """Dotted, as it is written on the command line."""
    annotation: Any
    """Type of its value."""
    facts: Facts

    @property
    def section(self) -> type | None:
        """The schema of what is below it, for one that is either null or a section; None for any other."""
        return _section(self.annotation)


def setting(meaning: str, *, decides: bool | tuple[str, str] | Literal["set"], **more: Any) -> Any:
    """A field of a schema class, with the facts of the setting. It has no default value: ``conf/`` has.

    Args:
        meaning, decides, more: as in ``Facts``; ``decides`` has to be thought of each time, hence no default.

    Returns:
        ``dataclasses.field(...)``, whose declared type is that of the field.
    """
    return dataclasses.field(metadata={_FACTS: Facts(meaning=meaning, decides=decides, **more)})


@dataclass_transform(frozen_default=True, field_specifiers=(setting,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are settings and other sections.

    Raises:
        TypeError: a field that is no section and has no facts, when the module is imported.
    """
    made = dataclass(frozen=True)(cls)
    for _ in settings_of(made):
        pass
    return made


def facts_of(field: dataclasses.Field[Any]) -> Facts | None:
    """What is known of the setting that a field is; None for a section, or a field of another dataclass."""
    return field.metadata.get(_FACTS)


def settings_of(schema: type, prefix: str = "") -> Iterator[Setting]:
    """All settings of a schema class in their order; those that are null or a section come before what they hold.

    Raises:
        TypeError: a field that is no section and has no facts.
    """
    annotations = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, annotation = f"{prefix}{field.name}", annotations[field.name]
        inner = _section(annotation)
        if inner is not annotation:
            if _FACTS not in field.metadata:
                raise TypeError(f"{schema.__name__}.{field.name}: write its facts: {field.name}: TYPE = setting(...)")
            yield Setting(key, annotation, field.metadata[_FACTS])
        if inner is not None:
            yield from settings_of(inner, f"{key}.")


def values_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Facts, Any]]:
    """(dotted key, facts, value) of all settings of a configuration; a section that is null is one value.

    Args:
        config: an instance of a schema class.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from values_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.metadata[_FACTS], value


def without_null(annotation: Any) -> Any:
    """The first member of a union that is not None; the annotation itself where it is none."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _section(annotation: Any) -> type | None:
    inner = without_null(annotation)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _either(first: float | None, second: float | None) -> float | None:
    return first if first is not None else second
