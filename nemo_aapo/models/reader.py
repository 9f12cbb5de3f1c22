"""The tensors of a Hugging Face directory by name, each read when it is asked for.

Not by ``safetensors.safe_open``: its ``get_tensor`` (0.8.0) never frees two Python integers, 64 bytes for each tensor
that it reads. A rollout server reads all tensors again after each training step.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_aapo.utils.safetensors import read_header, weight_files

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of safetensors, as it spells them, that models are written in."""


class WeightFiles(Mapping[str, torch.Tensor]):
    """Name -> tensor (on the CPU, the caller's own memory), in the files' order."""

    def __init__(self, directory: Path, only: Container[str] | None = None) -> None:
        """Read the headers.

        Args:
            only: the names of the tensors that count; None: all.

        Raises:
            ConfigError: a file is missing, cut off or damaged.
        """
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for name in weight_files(directory):
            entries, start = read_header(directory / name)
            for tensor, entry in entries.items():
                if only is None or tensor in only:
                    self._entries[tensor] = directory / name, start, entry

    def __getitem__(self, name: str) -> torch.Tensor:
        path, start, entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype, content = DTYPES[entry["dtype"]], bytearray(end - begin)
        if not content:
            return torch.empty(entry["shape"], dtype=dtype)
        with path.open("rb") as file:
            file.seek(start + begin)
            file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).view(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
