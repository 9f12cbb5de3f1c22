"""Sections of a Markdown page that a command writes itself, between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

from pathlib import Path

from nemo_aapo.utils.files import write_atomic


def write_section(path: Path, name: str, markdown: str) -> None:
    """Replace the text between the section's two markers; the rest of the page stays as it is.

    Raises:
        ValueError: the page does not hold each marker once, the opening one first.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(opening)
    _, _, after = rest.partition(closing)
    if page.count(opening) != 1 or page.count(closing) != 1 or closing in before:
        raise ValueError(f"{path}: needs the lines {opening} and {closing} once each, in this order")
    write_atomic(path, f"{before}{opening}\n\n{markdown.strip()}\n\n{closing}{after}")
