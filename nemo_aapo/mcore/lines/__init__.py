"""What differs between the two lines of Megatron beyond the hashes of their sources: a module each, chosen once."""

from __future__ import annotations

import importlib

from nemo_aapo import lines

line = importlib.import_module(f"{__name__}.{lines.installed().name}")
"""The module of the line that is installed."""
