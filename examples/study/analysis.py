"""The runs' metrics -> tables: means over seeds with Student's intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from examples.study.runs import Study
from nemo_aapo.evaluation.estimators import student_t_quantile
from nemo_aapo.run.metrics_file import read_metrics
from nemo_aapo.utils.tables import markdown

CURVE = "validation/accuracy_sampled"
GREEDY = "validation/accuracy_greedy"
MEASURES = {
    "early": "sampled, step {early}",
    "middle": "sampled, step {middle}",
    "last": "sampled, step {last}",
    "mean": "sampled, mean of the curve",
    "greedy": "greedy, step {last}",
}
"""The compared measures -> their names in the tables."""


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs of one algorithm."""

    steps: tuple[int, ...]
    """The V steps after which there was a validation."""
    sampled: np.ndarray
    """float64 [seeds, V], sampled accuracy."""
    greedy: np.ndarray
    """float64 [seeds, V], greedy accuracy."""
    zero_advantage: np.ndarray
    """float64 [seeds], fraction of the training groups without any advantage, mean over the steps."""
    entropy: np.ndarray
    """float64 [seeds], entropy of the policy in the last training step, nats per token."""
    completions: np.ndarray
    """int64 [seeds], number of completions generated in training, the reference's included."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % interval, mean plus and minus ``half``."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Interval:
        """Student's t interval of two or more values, which are assumed to be independent and normal."""
        values = np.asarray(values, dtype=np.float64)
        n = len(values)
        half = student_t_quantile(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
        return cls(float(values.mean()), float(half))

    def text(self, signed: bool = False) -> str:
        """``0.912 ± 0.008``"""
        return f"{self.mean:{'+' if signed else ''}.3f} ± {self.half:.3f}"


def read_runs(study: Study) -> dict[str, Runs]:
    """Algorithm -> its finished runs."""
    return {algorithm: _read(study, algorithm) for algorithm in study.algorithms}


def _read(study: Study, algorithm: str) -> Runs:
    curves, zero, entropy, completions = [], [], [], []
    steps: tuple[int, ...] = ()
    for seed in study.seeds:
        records = read_metrics(study.run_directory(algorithm, seed) / "metrics.jsonl")
        validations = [record for record in records if CURVE in record]
        training = [record for record in records if "loss" in record]
        steps = tuple(record["step"] for record in validations)
        curves.append([(record[CURVE], record[GREEDY]) for record in validations])
        zero.append(fmean(record["groups/zero_advantage"] for record in training))
        entropy.append(training[-1]["entropy"])
        completions.append(_completions(study, algorithm, seed, len(training)))
    both = np.array(curves)  # [seeds, V, 2]
    return Runs(steps, both[..., 0], both[..., 1], np.array(zero), np.array(entropy), np.array(completions))


def _completions(study: Study, algorithm: str, seed: int, steps: int) -> int:
    """Number of completions of a run: the policy's, and the reference's of each prompt that the steps took."""
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.data.sampler import PromptSampler

    config = load_config(study.overrides(algorithm, seed))
    policy = steps * config.prompts_per_step * config.group_size
    if config.algorithm.reference is None:
        return policy
    if config.algorithm.reference == "online":
        return 2 * policy
    assert isinstance(config.data.train, str), "the study trains on one file"
    with open(config.data.train, encoding="utf-8") as file:
        prompts = sum(bool(line.strip()) for line in file)
    sampler = PromptSampler(prompts, config.prompts_per_step, config.seed, config.data.shuffle)
    used = {i for step in range(steps) for i in sampler.indices(step)}
    return policy + len(used) * (config.algorithm.reference_samples or 0)


def measures(runs: Runs) -> dict[str, np.ndarray]:
    """Name of a measure -> its value for each seed, float64 [seeds]. The curve's mean leaves out step 0."""
    early, middle = _milestones(runs)
    return {
        "early": runs.sampled[:, early],
        "middle": runs.sampled[:, middle],
        "last": runs.sampled[:, -1],
        "mean": runs.sampled[:, 1:].mean(axis=1),
        "greedy": runs.greedy[:, -1],
    }


def _milestones(runs: Runs) -> tuple[int, int]:
    """Indices in the curve at which a fifth and a half of the steps are done."""
    points = len(runs.steps) - 1
    return max(1, round(points / 5)), max(1, round(points / 2))


def tables(runs: Mapping[str, Runs]) -> str:
    """Two Markdown tables: each algorithm, and the first one minus each of the others, paired by seed."""
    first, *others = runs
    early, middle = _milestones(runs[first])
    at = {"early": runs[first].steps[early], "middle": runs[first].steps[middle], "last": runs[first].steps[-1]}
    names = {key: name.format(**at) for key, name in MEASURES.items()}
    values = {algorithm: measures(found) for algorithm, found in runs.items()}
    rows = [
        [
            f"`{algorithm}`",
            *(Interval.of(values[algorithm][key]).text() for key in names),
            f"{found.zero_advantage.mean():.2f}",
            Interval.of(found.entropy).text(),
            f"{found.completions.mean():,.0f}",
        ]
        for algorithm, found in runs.items()
    ]
    by_algorithm = markdown(
        ["accuracy", *names.values(), "groups without advantage", "entropy at the end", "completions drawn"], rows
    )
    rows = [
        [
            f"`{first}` - `{other}`",
            *(Interval.of(values[first][key] - values[other][key]).text(signed=True) for key in names),
        ]
        for other in others
    ]
    return by_algorithm + "\n" + markdown(["difference", *names.values()], rows)
