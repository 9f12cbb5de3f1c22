"""What is compared with what: arms, seeds, and what was expected before the first run.

An arm is a way to train, given as settings; it is run on a task with every seed. Runs of one task and seed differ in
nothing but their arm: prompts come in the same order, and completions are sampled by the same random streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.study.tasks import DATA, TASKS, Task
from nemo_aapo.errors import ConfigError

PROMPTS_PER_STEP, GROUP_SIZE = 32, 8
VALIDATED_EVERY = 10
SEEDS = (1, 2, 3, 4, 5)
BEHIND_1 = ("rollout.async_depth=1", "algorithm.importance_weight_cap=2.0")
BEHIND_2 = ("rollout.async_depth=2", "algorithm.importance_weight_cap=2.0")
"""A run that trains on another policy's completions is asked to weigh their tokens, by at most 2."""
MASK = ("algorithm.token_mask={low: 0.5, high: 5}",)
"""IcePop's band: a token is dropped whose probability has moved by more since it was sampled."""

ARMS: dict[str, tuple[str, ...]] = {
    # the algorithms, each with its paper's settings
    "aapo": ("algorithm=aapo",),
    "gpg": ("algorithm=gpg",),
    "grpo": ("algorithm=grpo",),
    "dapo": ("algorithm=dapo",),
    "gspo": ("algorithm=gspo",),
    # AAPO's own levers
    "aapo, sampled": ("algorithm=aapo", "algorithm.margin.estimator=sampled"),
    "aapo, half bounds": ("algorithm=aapo", "algorithm.margin.low=-0.1", "algorithm.margin.high=0.14"),
    "aapo, wide bounds": ("algorithm=aapo", "algorithm.margin.low=-1", "algorithm.margin.high=1"),
    "no margin": ("algorithm=gpg", "algorithm.scale_rewards=true", "algorithm.rescale_dead_groups=false"),
    # completions of a policy that is so many optimizer steps behind, with and without a mask besides the weight
    "aapo, 1 behind": ("algorithm=aapo", *BEHIND_1),
    "aapo, 2 behind": ("algorithm=aapo", *BEHIND_2),
    "aapo, 1 behind, masked": ("algorithm=aapo", *BEHIND_1, *MASK),
    "aapo, 2 behind, masked": ("algorithm=aapo", *BEHIND_2, *MASK),
    "grpo, 1 behind": ("algorithm=grpo", *BEHIND_1),
    "grpo, 2 behind": ("algorithm=grpo", *BEHIND_2),
    "grpo, 1 behind, masked": ("algorithm=grpo", *BEHIND_1, *MASK),
    "grpo, 2 behind, masked": ("algorithm=grpo", *BEHIND_2, *MASK),
}
"""Name -> settings."""
ALGORITHMS = ("aapo", "gpg", "grpo", "dapo", "gspo")
LEVERS = ("aapo, sampled", "aapo, half bounds", "aapo, wide bounds", "no margin")
STALE = tuple(name for name in ARMS if "behind" in name)
PARTS = {
    "algorithms": tuple((task, arm) for task in ("sums", "rare", "words") for arm in ALGORITHMS),
    "levers": tuple((task, arm) for task in ("sums", "rare") for arm in ("aapo", *LEVERS)),
    "staleness": tuple(("sums", arm) for arm in ("aapo", "grpo", *STALE)),
}
"""Part of the study -> its tasks and arms."""

AXES = ("steps", "completions", "tokens")
"""What two arms are given the same amount of; the reference's completions and tokens count."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms on a task, and how the first was expected to do."""

    task: str
    arm: str
    other: str
    axis: str
    expected: str
    """``higher``, ``equal`` or ``lower``, written down before the first run."""


def _against_all(task: str, axis: str, expected: str, others: tuple[str, ...]) -> tuple[Comparison, ...]:
    return tuple(Comparison(task, "aapo", other, axis, expected) for other in others)


# Sums: the first, smaller study found AAPO ahead at equal steps by 0.6 to 1.0 points. The reference's completions are a
# quarter of all that AAPO samples here, and as much of a curve that still rises is worth more than that.
# Rare: nearly all completions of a group and of its reference are wrong, so that the margin is about nothing.
# Words: the verifier counts letters, few groups are silent, and the margin has little to add.
OTHERS = ALGORITHMS[1:]
COMPARISONS: tuple[Comparison, ...] = (
    *_against_all("sums", "steps", "higher", OTHERS),
    *_against_all("sums", "completions", "lower", OTHERS),
    *_against_all("sums", "tokens", "lower", OTHERS),
    *_against_all("rare", "steps", "equal", OTHERS),
    *_against_all("rare", "completions", "lower", OTHERS),
    *_against_all("rare", "tokens", "lower", OTHERS),
    *_against_all("words", "steps", "equal", OTHERS),
    *_against_all("words", "completions", "lower", OTHERS),
    *_against_all("words", "tokens", "lower", OTHERS),
    # The margin's part in AAPO: what it does to groups that are all right should show on sums only. The mean over K
    # reference rewards is less noisy than one of them; bounds of one reward's size make the margin as large as A.
    Comparison("sums", "aapo", "no margin", "steps", "higher"),
    Comparison("sums", "aapo", "aapo, sampled", "steps", "equal"),
    Comparison("sums", "aapo", "aapo, half bounds", "steps", "equal"),
    Comparison("sums", "aapo", "aapo, wide bounds", "steps", "lower"),
    Comparison("rare", "aapo", "no margin", "steps", "equal"),
    Comparison("rare", "aapo", "aapo, sampled", "steps", "equal"),
    Comparison("rare", "aapo", "aapo, half bounds", "steps", "equal"),
    Comparison("rare", "aapo", "aapo, wide bounds", "steps", "lower"),
    # A curve that is L steps behind is lower by about L of 60 parts of its rise, a point for each; the tokens'
    # probabilities hardly move in two steps, so that a mask drops few of them.
    *(
        Comparison("sums", f"{name}, {lag} behind", name, "steps", "lower")
        for name in ("aapo", "grpo")
        for lag in (1, 2)
    ),
    *(
        Comparison("sums", f"{name}, {lag} behind, masked", f"{name}, {lag} behind", "steps", "equal")
        for name in ("aapo", "grpo")
        for lag in (1, 2)
    ),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One arm on one task with one seed."""

    task: Task
    arm: str
    seed: int
    settings: tuple[str, ...] = ()
    """``KEY=VALUE`` settings of all runs."""

    def directory(self, study: Path) -> Path:
        """Where it leaves what every run leaves."""
        return study / self.task.name / self.arm.replace(", ", "-").replace(" ", "_") / f"seed_{self.seed}"

    def words(self, study: Path) -> list[str]:
        """Its settings; runs of one task and seed share a store of reference rewards."""
        base, name = study / "bases" / self.task.name, self.directory(study).relative_to(study)
        arm, store = ARMS[self.arm], study / self.task.name / f"reference_{self.seed}.sqlite"
        return [
            "experiment=quickstart",
            *arm,
            *([f"algorithm.reference_store={store}"] if "algorithm=aapo" in arm else []),
            f"seed={self.seed}",
            f"run.name={'_'.join(name.parts)}",
            f"run.dir={self.directory(study)}",
            f"model.path={base}",
            f"data.train={base / DATA}",
            f"data.validation={base / 'data' / 'validation.jsonl'}",
            f"prompts_per_step={PROMPTS_PER_STEP}",
            f"group_size={GROUP_SIZE}",
            f"trainer.max_steps={self.task.steps}",
            f"trainer.val_check_interval={VALIDATED_EVERY}",
            "validation.console_samples=0",
            "checkpoint.save_interval=1000",
            "export_hf_model=false",
            "exp_manager.create_tensorboard_logger=false",
            *self.task.words,
            *self.settings,
        ]


def runs_of(parts: Sequence[str], seeds: Sequence[int], settings: tuple[str, ...] = ()) -> list[Run]:
    """The runs of some parts, seed by seed, so that an unfinished study has all arms of some seeds.

    Raises:
        ConfigError: no such part, a seed twice, or a single one, which gives no interval.
    """
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"parts {','.join(sorted(unknown))}: no such part; there is {', '.join(PARTS)}")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {tuple(seeds)}: each once, and at least two, or there is no interval")
    arms = dict.fromkeys(pair for part in PARTS if part in parts for pair in PARTS[part])
    return [Run(TASKS[task], arm, seed, settings) for seed in seeds for task, arm in arms]
