"""Prompts, their tokenizer, and the order in which a run takes them."""

from __future__ import annotations

from nemo_aapo.config import ConfigError


class DataError(ConfigError):
    """Data or a tokenizer that can't be used; the message names the file, the line and the remedy."""
