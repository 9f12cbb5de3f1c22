"""Files: which form a name stands for, and the bytes of text whether or not they are compressed."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from nemo_aapo.config.sources import BINARY_FORMATS, FILE_FORMATS, TEXT_FORMATS
from nemo_aapo.errors import DataError

_GZIP = b"\x1f\x8b"
_FOREIGN = re.compile("[\udc80-\udcff]")
_HEAD = 4096
"""Bytes of a file that show what it is."""


def form_of(path: Path) -> str:
    """The ending of ``FILE_FORMATS`` that a file is read by. What has another one is JSON if it begins like it.

    Raises:
        DataError: it is of no form that is read.
    """
    name = path.name.lower()
    if name.endswith(BINARY_FORMATS):
        return path.suffix.lower()
    text = next((ending for ending in TEXT_FORMATS if name.removesuffix(".gz").endswith(ending)), None)
    if text is not None:
        return text
    with path.open("rb") as file:
        begins = file.read(_HEAD)
    if begins.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[", b""):
        return ".jsonl"
    raise DataError(
        f"{path}: a file of this kind is not read. Read are {', '.join(FILE_FORMATS)}, and text as .gz: "
        f"{', '.join(ending + '.gz' for ending in TEXT_FORMATS)}"
    )


class TextFile:
    """A file of text that may be compressed, as its first bytes tell; a context manager.

    Raises:
        DataError: on leaving, if it was compressed and damaged; on entering, if it is UTF-16.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = path.open("rb")
        self._size = max(path.stat().st_size, 1)
        begins = self._raw.peek(2)[:2]
        if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            self._raw.close()
            raise DataError(f"{path}: this is UTF-16; save it as UTF-8")
        packed = begins == _GZIP
        self.stream: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        """What it holds, decompressed."""
        self.lines: Iterator[tuple[int, bytes]] = self._lines()
        """Its lines with their numbers from 1, without a byte order mark; to be gone through once."""

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(self.stream, start=1):
            yield number, line if number > 1 else line.removeprefix(codecs.BOM_UTF8)

    def done(self) -> float:
        """The part of the file that has been read."""
        return min(self._raw.tell() / self._size, 1.0)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._raw.close()
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
            raise DataError(f"{self.path}: not a .gz file that can be read: {error}") from error


def foreign_byte(text: str) -> str:
    """The first byte that is no UTF-8, of a text that was decoded with ``surrogateescape``; empty if there is none.

    >>> foreign_byte(b"caf\\xe9".decode("utf-8", "surrogateescape"))
    'byte 0xe9'
    """
    found = None if text.isascii() else _FOREIGN.search(text)
    return f"byte 0x{ord(found[0]) - 0xDC00:02x}" if found else ""
