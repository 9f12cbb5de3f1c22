"""The class that transformers 5 names for a tokenizer in one ``tokenizer.json``; 4.57 has it by another name."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


class TokenizersBackend(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers resolves it lazily
    """``PreTrainedTokenizerFast`` under that name."""
