"""Whether a completion keeps to ``<think>...</think><answer>...</answer>``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Format(Reward):
    """1.0 if the completion is one think block and one answer block with nothing but white space around them.

    A prompt that ends in ``<think>``, as some chat templates write it, has opened the first block already.
    """

    kind: ClassVar[str] = "format"

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        opened = "<think>" if prompt.text.rstrip().endswith("<think>") else ""
        return float(_is_well_formed(opened + text))


def _is_well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think, end_think, answer, end_answer = (text.index(tag) for tag in _TAGS)
    between = text[end_think + len("</think>") : answer]
    around = text[:think] + text[end_answer + len("</answer>") :]
    return think < end_think < answer < end_answer and not between.strip() and not around.strip()
