"""The study's three tasks: what a tiny base model is taught, what is asked of it then, and how that is judged."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.base_model import Item, Lesson, Recipe, make_base_model, sums_with_slips
from nemo_aapo.data import gym_items
from nemo_aapo.rewards.base import Reward
from nemo_aapo.rewards.gym import ReasoningGym
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.utils.files import write_atomic

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers"
PROMPTS = 640
"""Training prompts: 60 steps of 32 prompts go through them three times."""
DATA = f"data/first_{PROMPTS}.jsonl"
"""These prompts, in the base model's directory."""


@dataclass(frozen=True, slots=True)
class RareSums(Recipe):
    """Sums that the base model hardly ever gets right: its slip is nearly all that it says."""

    true_share: float = 0.02
    slip_share: float = 0.94

    def lesson(self) -> Lesson:
        return sums_with_slips(self.seed, self.true_share, self.slip_share)


@dataclass(frozen=True, slots=True)
class Words(Recipe):
    """reasoning-gym's ``spell_backward``; the slip swaps the answer's last two letters."""

    length: int = 5
    """Letters of a word: the longer, the harder."""
    true_share: float = 0.24
    slip_share: float = 0.62

    def lesson(self) -> Lesson:
        find_reasoning_gym()
        items: dict[str, Item] = {}
        for index in range(3 * gym_items.CHUNK):
            parameters = {"min_word_len": self.length, "max_word_len": self.length}
            question, gold = gym_items.make_item("spell_backward", parameters, self.seed, index)
            answer = gym_items.parse_gold(gold)["answer"]
            if answer.isascii() and answer.islower():
                items[answer] = Item(question, answer, self._noisy(answer), gold)
        unique = list(items.values())
        return Lesson(supervised=unique[256 + PROMPTS :], training=unique[256 : 256 + PROMPTS], validation=unique[:256])

    def _noisy(self, answer: str) -> Callable[[random.Random], str]:
        def noisy(generator: random.Random) -> str:
            u = generator.random()
            if u < self.true_share:
                return answer
            if u < self.true_share + self.slip_share:
                return answer[:-2] + answer[-1] + answer[-2]
            i = generator.randrange(len(answer))
            return answer[:i] + generator.choice("abcdefghijklmnopqrstuvwxyz") + answer[i + 1 :]

        return noisy


class Verifier(ReasoningGym):
    """The verifier of ``spell_backward``: the share of letters that are right. It always ends, and needs no worker."""

    in_process = True


class Solved(Verifier):
    """Whether all letters are right."""

    kind = "solved"

    def __call__(self, prompt: Any, text: str, completion: Any) -> float:
        return float(super().__call__(prompt, text, completion) == 1.0)


@dataclass(frozen=True, slots=True)
class Task:
    """What the arms are compared on."""

    name: str
    title: str
    recipe: Recipe
    rewards: Callable[[], Sequence[tuple[Reward, float]]] | None = None
    """In place of the quickstart's, with weights; one of weight 0 only says what is right."""
    words: tuple[str, ...] = ()
    """Settings of its own."""
    steps: int = 60
    """Optimizer steps of a run."""

    def parts(self) -> dict[str, Any]:
        """What ``train`` is handed over beside the settings."""
        find_reasoning_gym()
        return {} if self.rewards is None else {"rewards": RewardRunner(self.rewards(), workers=0, timeout_s=10.0)}


TASKS = {
    task.name: task
    for task in (
        Task("sums", "sums with slips", Recipe()),
        Task("rare", "sums, rarely right", RareSums()),
        Task(
            "words",
            "words spelt backward",
            Words(),
            lambda: [(Verifier(), 1.0), (Solved(), 0.0)],
            (
                "data.max_prompt_tokens=56",
                "rewards=[{name: reasoning_gym, weight: 1.0}, {name: solved, weight: 0.0}]",
                "validation.reward=solved",
            ),
            steps=40,
        ),
    )
}


def make_base(task: Task, directory: Path, log: Callable[[str], None]) -> None:
    """The task's base model and its data, or find them made already.

    Raises:
        DataError: reasoning-gym is needed and not there; says how to install it.
    """
    make_base_model(directory, task.recipe, force=False, log=log)
    lines = (directory / "data" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    write_atomic(directory / DATA, "".join(f"{line}\n" for line in lines[:PROMPTS]))


def find_reasoning_gym() -> None:
    """Put ``.venv-peers`` on the path, where scripts/peers.sh installs reasoning-gym."""
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
