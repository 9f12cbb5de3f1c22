"""The verifiers of reasoning-gym, for prompts of ``data.train=reasoning_gym:TASK``."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.verdict import RULES
from nemo_aapo.text.answer import find_answer, tagged
from nemo_aapo.types import Completion, Prompt


@dataclass(frozen=True)
class ReasoningGym(Reward):
    """What the task's own verifier says, from 0.0 to 1.0.

    The answer is what the last ``<answer>`` block holds; without one the last ``\\boxed{}``, or else all of the text.
    """

    kind: ClassVar[str] = "reasoning_gym"

    @property
    def in_process(self) -> bool:
        """False: each task brings code of its own."""
        return False

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """Raises ValueError if the prompt is none of reasoning-gym's."""
        from nemo_aapo.data.gym_items import score

        return score(prompt.answer, _answer(text))

    def check_answer(self, answer: str) -> None:
        """Raise ValueError unless the gold answer names an item."""
        from nemo_aapo.data.gym_items import parse_gold

        parse_gold(answer)

    def depends_on(self) -> dict[str, Any]:
        """The version of reasoning-gym, and the rules by which an answer is found."""
        try:
            return {"rules": RULES, "reasoning-gym": importlib.metadata.version("reasoning-gym")}
        except importlib.metadata.PackageNotFoundError:
            return {"rules": RULES, "reasoning-gym": None}

    def load(self) -> None:
        """Import reasoning-gym, which takes seconds."""
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "reward 'reasoning_gym' needs the package reasoning-gym and what it imports: pip install --no-deps -r "
                f"requirements/reasoning_gym.txt ({error})"
            ) from error


def _answer(text: str) -> str:
    inside = tagged(text)
    if inside is not None:
        return inside.strip()
    answer = find_answer(text, tail=len(text))
    return answer.text.strip()
