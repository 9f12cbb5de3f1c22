"""The plan of the comparison: contestants, kinds of lengths, sizes, and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Lengths = Literal["fixed", "variable"]

OURS = {
    "ours": [
        "algorithm=grpo",
        "algorithm.kl_coefficient=0",
        "algorithm.loss_aggregation=token",
    ],
    "ours_stored": ["algorithm=aapo"],
    "ours_fresh": ["algorithm=aapo_paper"],
}
"""Name -> settings of our contestants. The first computes TRL's ``loss_type="dapo"`` without KL and margin."""

TRL = {"trl": False, "trl_twice": True}
"""Name -> whether TRL's contestant also generates the frozen reference's completions in each step, for the margin."""

LABELS = {
    "ours": "ours, margin off",
    "ours_stored": "ours, AAPO, stored reference rewards",
    "ours_fresh": "ours, AAPO, fresh reference rewards",
    "trl": "TRL",
    "trl_twice": "TRL, AAPO, generating twice",
}

CONTESTANTS: dict[Lengths, tuple[str, ...]] = {
    "fixed": ("ours", "trl", "ours_stored"),
    "variable": ("ours", "trl", "ours_stored", "trl_twice", "ours_fresh"),
}
"""Kind of lengths -> contestants, in the order of their turns."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of our contestants over one of TRL's."""

    arm: str
    lengths: Lengths
    ours: str
    theirs: str
    target: float | None = None
    """The largest ratio that meets the target; None: there is no target."""


COMPARISONS = (
    Comparison("a", "fixed", "ours", "trl", 0.85),
    Comparison("a, AAPO", "fixed", "ours_stored", "trl"),
    Comparison("b", "variable", "ours", "trl", 0.45),
    Comparison("b, AAPO", "variable", "ours_stored", "trl"),
    Comparison("c, stored", "variable", "ours_stored", "trl_twice", 0.35),
    Comparison("c, fresh", "variable", "ours_fresh", "trl_twice"),
)
MEMORY_TARGET = 0.7
"""Peak memory over TRL's at the large vocabulary."""


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a random Qwen2."""

    name: str
    hidden_size: int
    layers: int
    intermediate_size: int
    vocabulary: int = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    models: tuple[Model, ...] = (
        Model("0.3M", 64, 4, 192),
        Model("4M", 256, 4, 896),
        Model("20M", 512, 6, 1536),
    )
    large_vocabulary: Model = Model("0.3M, vocabulary 151,936", 64, 4, 192, 151_936)
    """Measured for memory only: fixed lengths, two steps."""
    lengths: tuple[Lengths, ...] = ("fixed", "variable")
    threads: tuple[int, ...] = (1, 2)
    prompts_per_step: int = 4
    group_size: int = 8
    prompt_tokens: int = 16
    new_tokens: int = 64
    """The limit. Fixed lengths are this long, variable ones a quarter of it on average."""
    repeats: int = 5
    """Measured steps of each contestant, after one that is not."""

    @property
    def sequences(self) -> int:
        """Completions of a step."""
        return self.prompts_per_step * self.group_size

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of a step, at the limit."""
        return self.sequences * (self.prompt_tokens + self.new_tokens)

    @property
    def data_prompts(self) -> int:
        """Prompts in the data: an epoch has eight steps."""
        return 8 * self.prompts_per_step


QUICK = Plan(
    models=(Model("tiny", 32, 2, 64, 256),),
    large_vocabulary=Model("tiny, vocabulary 4,096", 32, 2, 64, 4096),
    lengths=("variable",),
    threads=(1,),
    prompts_per_step=2,
    group_size=4,
    prompt_tokens=4,
    new_tokens=8,
    repeats=1,
)

LEARNING_RATE = 1e-6
CLIP = 0.2
MAX_GRADIENT_NORM = 1.0
MARGIN = (-0.2, 0.28)
STEPS_AT_MOST = 10_000
"""No contestant ends by itself."""


def reward(token_ids: Any) -> float:
    """A coin toss by the tokens, so that nearly every group has a signal: 1 for an even sum of ids."""
    return float(sum(map(int, token_ids)) % 2 == 0)
