"""The two lines of Megatron that this package runs on: releases that belong together, and which of them are installed.

``setup.py`` runs this file by itself, so it imports the standard library alone; ``scripts/environment.sh`` reads the
fields ``python``, ``requirements`` and ``environment`` by lines, so each stands in one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """Releases of Megatron and of what it is built on."""

    name: str
    python: tuple[str, ...]
    """Versions of Python that all of its packages are there for; the first is that of its CPU environment."""
    pins: Mapping[str, str]
    """Version by distribution, of those that decide the line; ``requirements`` has all others."""
    ranges: tuple[str, ...]
    """The same as ``setup.py`` declares it, in the extra of this name."""
    requirements: tuple[str, ...]
    """Lists in ``requirements/`` that are its CPU environment; a later one's version of a package counts."""
    image_requirements: tuple[str, ...]
    """The same of its GPU image, what the base image lacks."""
    transformer_engine: tuple[tuple[int, int], tuple[int, int]]
    """The versions that its Megatron takes: from, and below."""
    environment: str
    """The folder where ``scripts/environment.sh`` makes that environment."""


TRTLLM = Line(
    name="trtllm",
    python=("3.11", "3.10", "3.12"),
    pins={"megatron-core": "0.16.1", "megatron-bridge": "0.3.1", "transformers": "4.57.6"},
    ranges=(
        "megatron-core>=0.16.1,<0.17",
        "transformers>=4.57,<5",  # as megatron-bridge asks
        "huggingface_hub<1",  # as transformers 4 asks; some data libraries would raise it
    ),
    requirements=("cpu.txt", "bridge.txt"),
    image_requirements=("gpu.txt",),
    transformer_engine=((2, 10), (2, 12)),  # the Bridge takes >= 2.10, < 2.13; megatron-core >= 2.9, < 2.12
    environment=".venv",
)
"""That of TensorRT-LLM 1.2.1, which pins transformers 4.57: what the image of the Dockerfile has, and the default."""

NEWEST = Line(
    name="newest",
    python=("3.12",),
    pins={"megatron-core": "0.19.2", "megatron-bridge": "0.6.2", "transformers": "5.12.1"},
    ranges=(
        "megatron-core>=0.19.2,<0.20",  # asks for Python 3.12: pip refuses this extra by another
        "transformers>=5.8,<=5.12.1",  # as megatron-bridge asks
    ),
    requirements=("cpu.txt", "bridge.txt", "newest.txt"),
    image_requirements=("gpu.txt", "newest.txt"),
    transformer_engine=((2, 10), (3, 0)),  # neither says
    environment=".venv-newest",
)
"""The newest releases; TensorRT-LLM needs an environment of its own beside them."""

LINES = {line.name: line for line in (TRTLLM, NEWEST)}


def line_of(distribution: str, version: str) -> Line:
    """The line that this version of one of the deciding packages is of, or the one that it is nearest to."""
    return TRTLLM if _release(version) <= _release(TRTLLM.pins[distribution]) else NEWEST


@functools.cache
def installed(distribution: str = "megatron-core") -> Line:
    """The line that this package is of here, one of those that decide; the default where there is none.

    Whether it really is that release the sources say that are replaced in it (``mcore/replaced.py``).
    """
    try:
        return line_of(distribution, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return TRTLLM


def strangers() -> Iterator[str]:
    """What is said of packages that are not of megatron-core's line, among those that decide it."""
    line = installed()
    for name, wanted in line.pins.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if (other := line_of(name, version)) is not line:
            yield f"{name} {version} is of the line {other.name} (here {wanted})"


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number, also of ``5.0rc1`` and ``0.19+cu130``."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
