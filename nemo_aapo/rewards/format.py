"""Whether a completion keeps to the tags that its prompt asks for, in both styles of AAPO's authors.

``think_answer``  <think> reasoning </think> <answer> answer </answer>     open-r1/utils/rewards.py of JianxXiong/AAPO
``think``         reasoning, a line with </think> alone, then the answer   open-rs/utils/rewards.py there
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from nemo_aapo.rewards.base import Reward
from nemo_aapo.types import Completion, Prompt

Style = Literal["think_answer", "think"]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_END_LINE = "\n</think>\n"


@dataclass(frozen=True)
class Format(Reward):
    """1.0 if the completion is well-formed, else 0.0.

    In the style ``think_answer`` it is one think block and one answer block with nothing but white space around them;
    a prompt that ends in ``<think>``, as some chat templates write it, has opened the first block already. In the style
    ``think``, whose prompts always do, exactly one line is ``</think>``.
    """

    style: Style = "think_answer"

    kind: ClassVar[str] = "format"

    def __post_init__(self) -> None:
        _check_style(self.kind, self.style)

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """1.0 or 0.0."""
        if self.style == "think":
            return float(text.count(_END_LINE) == 1)
        return float(_is_well_formed(_opening(prompt) + text))


@dataclass(frozen=True)
class TagCount(Reward):
    """The share of the style's tags that are there exactly once: of two tags in ``think``, of four in the other."""

    style: Style = "think_answer"

    kind: ClassVar[str] = "tag_count"

    def __post_init__(self) -> None:
        _check_style(self.kind, self.style)

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """From 0.0 to 1.0."""
        text = _opening(prompt) + text
        tags = ("<think>\n", _END_LINE) if self.style == "think" else _TAGS
        return sum(text.count(tag) == 1 for tag in tags) / len(tags)


def _check_style(kind: str, style: str) -> None:
    if style not in get_args(Style):
        raise ValueError(f"reward {kind!r}: style must be one of {', '.join(get_args(Style))}, not {style!r}")


def _opening(prompt: Prompt) -> str:
    """What the prompt has opened for the completion, with the line break behind it."""
    stripped = prompt.text.rstrip()
    return prompt.text[len(stripped) - len("<think>") :] if stripped.endswith("<think>") else ""


def _is_well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think, end_think, answer, end_answer = (text.index(tag) for tag in _TAGS)
    between = text[end_think + len("</think>") : answer]
    around = text[:think] + text[end_answer + len("</answer>") :]
    return think < end_think < answer < end_answer and not between.strip() and not around.strip()
