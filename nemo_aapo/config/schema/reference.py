"""Writes what people read from the schema: the comments of ``conf/`` and the settings reference of the docs.

python -m nemo_aapo.config.schema.reference     from the checkout's top; a test tells when it is due
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.config.schema import Config, EvaluationConfig
from nemo_aapo.config.schema.config_file import Entry, entries_of, with_comments
from nemo_aapo.config.schema.facts import Facts, Setting, settings_of, without_null

SCHEMAS: Mapping[str, type] = {"train_aapo": Config, "evaluate": EvaluationConfig}
"""Name of the config file -> its schema."""
REFERENCE = Path("docs/reference/settings.md")
_TITLES = {"train_aapo": "Training", "evaluate": "Evaluation"}
_PLAIN = {int: "integer", float: "number", str: "text", bool: "true, false"}
_HEAD = """\
# Settings

Written by `python -m nemo_aapo.config.schema.reference` from the schema (`nemo_aapo/config/schema/`): change it there.

## How to add a setting

1. Declare it in the section where it belongs, in `nemo_aapo/config/schema/`, with all that is known of it. There is no
   default for `decides`: ask whether a run may go on with another value.

       prompts_per_step: int = setting("prompts of one training step", decides=True, minimum=1, main=True)

2. Give it its default value in `conf/train_aapo.yaml` (`conf/evaluate.yaml`).
3. Run the command above: it writes the comments of `conf/` and this reference. `--help` shows it if it is `main`.
4. Refuse in `nemo_aapo/config/checks.py` what can't work together with other settings; limits of its own are facts.

A new setting that decides the result changes the digest of every run, so that runs from before it can't go on;
`tests/config/test_decisive.py` holds a digest that version 0.1.0 wrote, and fails.

## How to read the tables

*Decides*: whether the setting decides the result of a run, so that a run can't go on with another value. All others,
layout and machines among them, may change at every start. Model and data count as what they hold, not by their paths:
they may be moved and renamed, and what was swapped is refused.
"""


def reference(files: Mapping[str, str]) -> str:
    """The text of the settings reference.

    Args:
        files: name of a config file -> its text, which has the defaults.
    """
    parts = [_HEAD]
    for name, schema in SCHEMAS.items():
        parts.append(f"\n## {_TITLES[name]}: `conf/{name}.yaml`\n")
        parts += _tables(list(settings_of(schema)), entries_of(files[name]))
    return "".join(parts)


def _tables(settings: list[Setting], entries: Mapping[str, Entry]) -> list[str]:
    """One table for the settings outside sections and one for each section of the file."""
    outside = [setting for setting in settings if "." not in setting.key]
    sections = list(dict.fromkeys(s.key.partition(".")[0] for s in settings if "." in s.key))
    tables = [_table(outside, entries)]
    for section in sections:
        inside = [setting for setting in settings if setting.key.startswith(f"{section}.")]
        tables.append(f"\n### {section}\n{_table(inside, entries)}")
    return tables


def _table(settings: list[Setting], entries: Mapping[str, Entry]) -> str:
    rows = ["Setting | Type | Default | Decides | Meaning", "--- | --- | --- | --- | ---"]
    for setting in settings:
        entry = entries.get(setting.key)
        cells = (
            f"`{setting.key}`",
            ", ".join(filter(None, (type_in_words(setting.annotation), setting.facts.limits))),
            _default(entry.value if entry else None),
            _decides(setting.facts),
            setting.facts.meaning,
        )
        rows.append(" | ".join(cell.replace("|", r"\|") for cell in cells))
    return "\n" + "".join(f"| {row} |\n" for row in rows)


def type_in_words(annotation: Any) -> str:
    """What may be written as the value: ``integer``, ``text or null``, ``list of text``."""
    members = [part for part in typing.get_args(annotation) if part is not type(None)]
    optional = " or null" if type(None) in typing.get_args(annotation) else ""
    inner = without_null(annotation)
    if inner is not annotation and len(members) > 1:
        return " or ".join(type_in_words(part) for part in members) + optional
    if typing.get_origin(inner) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(inner)) + optional
    if typing.get_origin(inner) is tuple:
        return f"list of {type_in_words(typing.get_args(inner)[0])}{optional}"
    return _PLAIN.get(inner, "mapping") + optional


def _default(value: str | None) -> str:
    if value is None:
        return ""
    return "must be given" if value == "???" else f"`{value}`" if value else "in the file"


def _decides(facts: Facts) -> str:
    if isinstance(facts.decides, tuple):
        return f"with `{'='.join(facts.decides)}`"
    return "where set" if facts.decides == "set" else "yes" if facts.decides else ""


def main() -> None:
    """Write comments and reference in the checkout that is the working directory."""
    files = {}
    for name, schema in SCHEMAS.items():
        path = Path("conf") / f"{name}.yaml"
        files[name] = with_comments(path.read_text(encoding="utf-8"), schema)
        path.write_text(files[name], encoding="utf-8")
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(reference(files), encoding="utf-8")


if __name__ == "__main__":
    main()
