"""The line ``newest``: Megatron-Bridge 0.6.2 stays as it is."""

from __future__ import annotations


def mend_bridge() -> None:
    """Nothing: its scatter takes any tensors, and it numbers experts that are modules of their own."""
