"""The device that this rank computes on."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """This rank's GPU (``parallel.join`` chose it), or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
