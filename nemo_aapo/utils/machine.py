"""The processor, as far as it decides which kernels compute, and hence the last bits of sums."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_CPU_FACTS = Path("/proc/cpuinfo")


@functools.cache
def processor_maker() -> str | None:
    """``GenuineIntel``, ``AuthenticAMD`` or the like; None where the system has no such name."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", _CPU_FACTS.read_text(), re.MULTILINE) if _CPU_FACTS.exists() else None
    return found[1] if found else None


def instruction_set() -> str:
    """The kind of processor that this process computes by: ``AVX512, GenuineIntel`` or ``sm_90``."""
    import torch

    if torch.cuda.is_available():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    maker = processor_maker()
    # matrix products are a vendor's library, which chooses its kernels by the maker too
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *([maker] if maker else [])])
