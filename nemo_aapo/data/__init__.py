"""Prompts, their tokenizer, and the order in which a run takes them."""

from __future__ import annotations


class DataError(ValueError):
    """Data or a tokenizer that can't be used; the message names the file, the line and the remedy."""
