"""The weights of a Hugging Face directory as its files announce them: which files, which tensors. No library, no torch.

Nothing here knows a model: ``models/weights.py`` says whether these are the tensors that one needs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.errors import ConfigError

WEIGHTS = "model.safetensors"
"""The file of all weights, where one is enough."""
INDEX = "model.safetensors.index.json"
"""Says which of several files holds which tensor."""
SHARDS = "model-*-of-*.safetensors"
"""The names that several files have."""
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
"""Bits of a number, of the dtypes that take whole bytes and have more than one."""
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a weight file announces it.

    Example: ``TensorHeader("model-00001-of-00002.safetensors", (151936, 896), "BF16")``
    """

    file: str
    """Name of the file that holds the tensor."""
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    dtype: str
    """The dtype as safetensors spells it: ``F32``, ``BF16``, ``F16``."""


def has_weights(directory: Path) -> bool:
    """Whether the directory holds weights, whole or not."""
    return (directory / WEIGHTS).exists() or (directory / INDEX).exists()


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that make up the model.

    Raises:
        ConfigError: none there, a file that the index names is missing, or two sets of weights, of which nothing says
            which one is meant.
    """
    index = directory / INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        rivals = [] if names == [WEIGHTS] else [INDEX]
    else:
        names = [WEIGHTS]
        rivals = sorted(path.name for path in directory.glob(SHARDS))
    whole = (directory / WEIGHTS).exists()
    if whole and rivals:
        raise ConfigError(
            f"model.path={directory}: two sets of weights, {WEIGHTS} and {rivals[0]}; transformers would load the "
            "first and other programs the second: remove the one that is not meant"
        )
    if not has_weights(directory):
        raise ConfigError(
            f"model.path={directory}: no {WEIGHTS} and no index of several. Pickled weights (*.bin) are not read: "
            "convert them with transformers' save_pretrained(safe_serialization=True)"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing or not names:
        raise ConfigError(
            f"{index}: names files that are not there: {', '.join(missing) or 'none at all'}. Half downloaded?"
        )
    return names


def tensor_headers(directory: Path) -> dict[str, TensorHeader]:
    """All tensors of a model directory by name. Only headers are read: a 70B model takes milliseconds.

    Raises:
        ConfigError: as ``weight_files``; a file is cut off or damaged; or index and files disagree.
    """
    found: dict[str, TensorHeader] = {}
    for file in weight_files(directory):
        for name, entry in read_header(directory / file)[0].items():
            if name in found:
                raise ConfigError(f"model.path={directory}: {name} is in {found[name].file} and in {file}")
            found[name] = TensorHeader(file, tuple(entry["shape"]), entry["dtype"])
    if (directory / INDEX).exists():
        place = _weight_map(directory / INDEX)
        for name in sorted(place.keys() | found.keys()):
            if name not in found or place.get(name, found[name].file) != found[name].file:
                raise ConfigError(f"{directory / INDEX}: says that {name} is in {place[name]}, which lacks it")
            if name not in place:
                raise ConfigError(f"{directory / INDEX}: does not name {name}, which is in {found[name].file}")
    return found


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file of weights holds, in milliseconds whatever its size.

    Returns:
        Name of a tensor -> its entry (``dtype``, ``shape``, ``data_offsets``); and the byte from which on these offsets
        count.

    Raises:
        ConfigError: the file is cut off or damaged, or can't be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if _LFS_POINTER.startswith(start) and start:
                raise ConfigError(f"{path}: a pointer of Git LFS in place of the file: `git lfs pull` fetches it")
            (header_size,) = struct.unpack("<Q", start)
            if header_size > size:
                raise ValueError("header cut off")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        promised = 8 + header_size + _data_size(header)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error}). Half-written?") from None
    if size != promised:
        raise ConfigError(f"{path}: has {size} bytes where its header promises {promised}. Half-written?")
    return header, 8 + header_size


def _data_size(header: dict[str, Any]) -> int:
    """Bytes of all tensors, which lie one after the other.

    Raises:
        ValueError: they do not, or one has not the bytes of its shape; the message names it.
    """
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, stop = entry["data_offsets"]
        bits = BITS.get(entry["dtype"])
        if start != end or (bits and (stop - start) * 8 != math.prod(entry["shape"]) * bits):
            raise ValueError(f"{name} can't lie at bytes {start} to {stop}")
        end = stop
    return end


def model_digest(path: str) -> str:
    """A digest of all of a model's weights and its ``config.json``, 16 hex digits: what a reference is known by.

    Reads every byte, 1 to 2 GB a second and core; at once for files that it has read before.

    Raises:
        ConfigError: as ``weight_files``.
    """
    directory = Path(path)
    files = [directory / name for name in ["config.json", *weight_files(directory)]]
    return _digest(tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for file in files))


@functools.lru_cache(maxsize=8)
def _digest(files: tuple[tuple[str, int, int, int], ...]) -> str:
    def of_file(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as threads:  # which hashing lets run side by side
        return hashlib.sha256(b"".join(threads.map(of_file, (path for path, *_ in files)))).hexdigest()[:16]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its file."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) and file == Path(file).name for file in found.values()):
            return dict(found)
        problem = "weight_map does not lead to names of files beside it"
    except OSError as error:
        problem = f"can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"no JSON object with a weight_map ({error}). Half-written?"
    raise ConfigError(f"{index}: {problem}")
