"""The header of a safetensors file, read without the library and without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from nemo_aapo.errors import ConfigError


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file of weights holds, in milliseconds whatever its size.

    Returns:
        Name of a tensor -> its entry (``dtype``, ``shape``, ``data_offsets``); and the byte from which on these offsets
        count.

    Raises:
        ConfigError: the file is cut off or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > size:
                raise ValueError("header cut off")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        promised = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error}). Half-written?") from None
    if size != promised:
        raise ConfigError(f"{path}: has {size} bytes where its header promises {promised}. Half-written?")
    return header, 8 + header_size
