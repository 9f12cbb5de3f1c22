"""The plan of the comparison: contestants, kinds of lengths, sizes, and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemo_aapo.errors import ConfigError

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


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of our contestants over one of TRL's."""

    arm: str
    lengths: Lengths
    ours: str
    theirs: str
    target: float | None = None
    """The largest ratio that meets the target; None: there is no target."""


COMPARISONS = (  # neighbours of like lengths share a contestant, which then need not start again
    Comparison("a", "fixed", "ours", "trl", 0.85),
    Comparison("a, AAPO", "fixed", "ours_stored", "trl"),
    Comparison("b", "variable", "ours", "trl", 0.45),
    Comparison("b, AAPO", "variable", "ours_stored", "trl"),
    Comparison("c, stored", "variable", "ours_stored", "trl_twice", 0.35),
    Comparison("c, fresh", "variable", "ours_fresh", "trl_twice"),
)
REAL_COMPARISONS = (
    Comparison("a", "fixed", "ours", "trl", 0.62),
    Comparison("b", "variable", "ours", "trl", 0.30),
    Comparison("c, stored", "variable", "ours_stored", "trl_twice", 0.22),
)
"""Those with a target, whose steps take up to a minute at 135 million parameters."""
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
    heads: int = 8
    key_value_heads: int = 2


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model of somebody's. Its completions end where the model ends them: it has variable lengths only."""

    directory: Path
    """Hugging Face files, the tokenizer among them."""

    @property
    def name(self) -> str:
        """The directory's, with that of the one above it."""
        return "/".join(self.directory.parts[-2:])


SMALL = (Model("0.3M", 64, 4, 192), Model("4M", 256, 4, 896), Model("20M", 512, 6, 1536))
SIZES = {model.name: model for model in (*SMALL, Model("135M", 576, 30, 1536, 49_152, 9, 3))}
"""What ``--models`` calls by name. The last has SmolLM2's sizes; that its output layer is not tied to the embedding, so
that the end of sequence can have a probability of its own, adds 28 million to the 135."""


def models(names: Sequence[str]) -> tuple[Model | Pretrained, ...]:
    """The models that a user names, each by its size or by its directory.

    Raises:
        ConfigError: a name is neither.
    """
    for name in names:
        if name not in SIZES and not (Path(name) / "config.json").is_file():
            raise ConfigError(
                f"benchmark.py peers --models: {name!r} is neither a size ({', '.join(SIZES)}) nor a Hugging Face "
                f"directory, as there is no {Path(name) / 'config.json'}"
            )
    return tuple(SIZES.get(name) or Pretrained(Path(name).resolve()) for name in dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    models: tuple[Model | Pretrained, ...] = SMALL
    large_vocabulary: Model | None = Model("0.3M, vocabulary 151,936", 64, 4, 192, 151_936)
    """Measured for memory only: fixed lengths, two steps. None: no such measurement."""
    comparisons: tuple[Comparison, ...] = COMPARISONS
    """In this order; those of like lengths are neighbours."""
    threads: tuple[int, ...] = (1, 2)
    prompts_per_step: int = 4
    group_size: int = 8
    prompt_tokens: int = 16
    new_tokens: int = 64
    """The limit. Fixed lengths are this long, variable ones a quarter of it on average."""
    repeats: int = 5
    """Measured steps of each contestant, after one that is not."""

    def comparisons_of(self, model: Model | Pretrained) -> dict[Lengths, list[Comparison]]:
        """Kind of lengths -> comparisons, those that a model can take part in."""
        found: dict[Lengths, list[Comparison]] = {}
        for comparison in self.comparisons:
            if comparison.lengths == "variable" or isinstance(model, Model):
                found.setdefault(comparison.lengths, []).append(comparison)
        return found

    def sized_for(self, model: Model | Pretrained) -> Plan:
        """The plan with the longest prompt of a model: a pretrained one gets questions in its chat template."""
        return self if isinstance(model, Model) else replace(self, prompt_tokens=PRETRAINED_PROMPT_TOKENS)

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
    comparisons=tuple(comparison for comparison in COMPARISONS if comparison.lengths == "variable"),
    threads=(1,),
    prompts_per_step=2,
    group_size=4,
    prompt_tokens=4,
    new_tokens=8,
    repeats=1,
)

REAL = Plan(models=(), large_vocabulary=None, comparisons=REAL_COMPARISONS, threads=(2,), repeats=3)
"""For ``--models``."""

PRETRAINED_PROMPT_TOKENS = 96
"""Limit of a pretrained model's prompts."""
LEARNING_RATE = 1e-6
CLIP = 0.2
MAX_GRADIENT_NORM = 1.0
MARGIN = (-0.2, 0.28)
STEPS_AT_MOST = 10_000
"""No contestant ends by itself."""


def reward(token_ids: Any) -> float:
    """A coin toss by the tokens, so that nearly every group has a signal: 1 for an even sum of ids."""
    return float(sum(map(int, token_ids)) % 2 == 0)
