"""A config file of ``conf/`` as text: where its keys stand, and its comments, which are written from the schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from nemo_aapo.config.schema.facts import settings_of

COMMENT_COLUMN = 38


@dataclass(frozen=True)
class Entry:
    """One key of a config file."""

    value: str
    """The value as it stands in the file; empty for what goes on below the key."""
    line: int
    """Where the key stands, from 0."""
    end: int
    """Column behind the key and what follows it on its line, without the comment."""


def entries_of(text: str) -> dict[str, Entry]:
    """Dotted key -> where it stands in the text of a config file, sections too; lists are one value."""
    return dict(_entries(yaml.compose(text, Loader=yaml.SafeLoader), text, ""))


def with_comments(text: str, schema: type) -> str:
    """The config file with the meaning of each setting as the comment behind it; sections keep theirs."""
    lines, entries = text.splitlines(), entries_of(text)
    for setting in settings_of(schema):
        if entry := entries.get(setting.key):
            code = lines[entry.line][: entry.end]
            lines[entry.line] = f"{code.ljust(max(COMMENT_COLUMN, entry.end + 2))}# {setting.facts.meaning}"
    return "\n".join(lines) + "\n"


def _entries(node: yaml.Node | None, text: str, prefix: str) -> Iterator[tuple[str, Entry]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        if block:
            yield name, Entry("", line, key.end_mark.column + len(":"))
        else:
            shown = text[value.start_mark.index : value.end_mark.index]
            yield name, Entry(shown, line, value.end_mark.column)
        yield from _entries(value, text, f"{name}.") if block else ()
