"""Whether an algorithm keeps to what it promises, on a made-up batch: its results don't depend on how that is cut.

A run cuts its batch into micro-batches, over ranks, and with context parallelism sequences over ranks; it leaves out
what has no advantage. All of that must give the loss and the gradient of the batch in one piece.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemo_aapo.algorithms import hooks
from nemo_aapo.algorithms.base import Algorithm, ScoredGroups, Tokens
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import AlgorithmConfig
from nemo_aapo.errors import AlgorithmError, one_line

GROUPS, SIZE, REFERENCES, LIMIT, VOCAB = 6, 4, 4, 9, 11
TOLERANCE = 1e-9  # of float64 sums in another order
DEADLOCK_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One promise."""

    promise: str
    wrong: str = ""
    """What is wrong, and what to do; empty: it holds."""


def check(algorithm: Algorithm, config: AlgorithmConfig) -> list[Finding]:
    """All promises of an algorithm, in the order in which a step meets them.

    Args:
        config: the settings around it: denominators, importance weights.
    """
    objective, groups = Objective.of(config, LIMIT, algorithm), _groups()
    tests: Sequence[tuple[str, Callable[[Objective, ScoredGroups], Iterator[str]]]] = (
        ("advantages: a finite number for every completion with a reward, also of odd groups", _advantages),
        ("advantages: those of a group do not depend on the groups beside it", _separate),
        ("loss: a scalar with a gradient, and sums for metrics; nothing written into what it is given", _form),
        ("loss: finite on long ratios, padding, an empty micro-batch", _finite),
        ("loss: a sum of weights times values", _linear),
        ("loss: loss and gradient are the same over any micro-batches and ranks", _split),
        ("loss: loss and gradient are the same where sequences are cut over ranks", _cut),
        ("loss: a completion without an advantage has no gradient, so that it may be left out", _without),
        ("loss: no gradient through tokens.entropy that a run would not compute", _entropy),
        ("metrics: sums over any micro-batches, and numbers of a step", _metrics),
    )
    return [Finding(promise, _first(test(objective, groups))) for promise, test in tests]


def _first(wrong: Iterator[str]) -> str:
    try:
        return next(wrong, "")
    except AlgorithmError as error:
        return str(error)
    except Exception as error:  # of the algorithm, whatever it may be
        return f"{type(error).__name__}: {one_line(error)}"


# ---------------------------------------------------------------- advantages


class _Parts(dict[str, np.ndarray]):
    """The rewards as the part of whatever name an algorithm asks for."""

    def __init__(self, rewards: np.ndarray) -> None:
        super().__init__(reward=rewards)

    def __missing__(self, name: str) -> np.ndarray:
        return self["reward"]


def _groups() -> ScoredGroups:
    """Equal rewards, one scored completion, none, one reference reward: what a run meets now and then."""
    rng = np.random.default_rng(0)
    rewards = rng.choice([0.0, 1.0, 0.3], (GROUPS, SIZE))
    rewards[0], rewards[1, 1:], rewards[2] = 1.0, np.nan, np.nan
    reference = rng.choice([0.0, 1.0], (GROUPS, REFERENCES))
    reference[3, 1:], reference[4] = np.nan, np.nan
    lengths = rng.integers(1, LIMIT + 1, (GROUPS, SIZE))
    lengths[3, :3] = 0, 1, LIMIT
    return ScoredGroups(
        rewards,
        reference,
        seeds=list(range(GROUPS)),
        reward_parts=_Parts(rewards),
        lengths=lengths,
        truncated=lengths == LIMIT,
        step=3,
        max_steps=10,
    )


def _part(groups: ScoredGroups, rows: slice) -> ScoredGroups:
    names = ("rewards", "reference_rewards", "lengths", "truncated", "seeds")
    parts = {name: value[rows] for name in names if (value := getattr(groups, name)) is not None}
    return dataclasses.replace(groups, **parts, reward_parts=_Parts(groups.rewards[rows]))


def _advantages(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    made = objective.advantages(groups)
    if not np.array_equal(made, objective.advantages(groups), equal_nan=True):
        yield "a second call gave other numbers: take random ones from groups.random(i)"


def _separate(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    if objective.algorithm.whole_batch:
        return
    whole = objective.advantages(groups)
    for i in range(GROUPS):
        alone = objective.advantages(_part(groups, slice(i, i + 1)))[0]
        if not np.allclose(alone, whole[i], rtol=TOLERANCE, equal_nan=True):
            yield (
                f"a group has {alone} alone and {whole[i]} beside others: a rank sees its own groups only. Set "
                "whole_batch = True, so that the groups of all ranks come at once"
            )


# ---------------------------------------------------------------- losses


@dataclass(frozen=True)
class _Batch:
    """Sequences with a leaf that takes the gradient."""

    leaf: torch.Tensor
    advantages: Sequence[float]
    lengths: Sequence[int]
    columns: dict[str, Any]
    entropy_gradient: bool
    """Whether the entropies carry a gradient, as they do in a run that needs it."""

    @classmethod
    def of(cls, objective: Objective, groups: ScoredGroups) -> _Batch:
        advantages = objective.advantages(groups).ravel()
        assert groups.lengths is not None
        kept = ~np.isnan(advantages)
        lengths = groups.lengths.ravel()[kept].tolist()
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(sum(lengths), VOCAB, dtype=torch.float64, generator=generator)
        near = leaf.log_softmax(-1)[:, 0]
        noise = [0.3 * torch.randn(len(near), dtype=torch.float64, generator=generator) for _ in range(3)]
        weights = objective.token_weights(lengths, total_tokens=sum(lengths), total_sequences=len(lengths))
        names = ("rollout_logprobs", "old_logprobs", "reference_logprobs")
        columns = {name: near + part for name, part in zip(names, noise, strict=True)}
        columns["weights"] = torch.from_numpy(np.repeat(weights, lengths))
        columns["advantages"] = torch.from_numpy(np.repeat(advantages[kept], lengths))
        needed = objective.config.entropy_coefficient > 0 or objective.algorithm.needs_entropy_gradient
        return cls(leaf.requires_grad_(), advantages[kept].tolist(), lengths, columns, needed)

    def tokens(self, sequences: Sequence[int], part: slice = slice(None), **changes: object) -> Tokens:
        """Of these sequences, and of each of them a part."""
        starts = np.cumsum([0, *self.lengths])
        index = [np.arange(starts[i], starts[i + 1])[part] for i in sequences]
        at = torch.from_numpy(np.concatenate([*index, np.zeros(0, np.int64)]))
        distribution = self.leaf[at].log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        return Tokens(
            logprobs=distribution[:, 0],
            entropy=entropy if self.entropy_gradient else entropy.detach(),
            lengths=[len(part) for part in index],
            versions=torch.full((len(at),), 3),
            **{name: column[at] for name, column in self.columns.items()},
        ).replace(**changes)


Result = tuple[float, torch.Tensor, dict[str, float]]


def _run(objective: Objective, batch: _Batch, parts: Sequence[Tokens]) -> Result:
    """Loss, gradient and metrics, added up over micro-batches."""
    batch.leaf.grad = None
    total, sums = 0.0, dict[str, float]()
    for tokens in parts:
        value, metrics = objective.token_loss(tokens)
        value.backward()
        total += value.item()
        for key, number in metrics.items():
            add = min if key.startswith("min/") else lambda a, b: a + b
            sums[key] = float(number) if key not in sums else add(sums[key], float(number))
    return total, torch.zeros_like(batch.leaf) if batch.leaf.grad is None else batch.leaf.grad, sums


def _differs(one: Result, other: Result) -> str:
    scale = float(one[1].abs().max()) + 1e-12
    if not abs(one[0] - other[0]) <= TOLERANCE * (abs(one[0]) + scale):  # NaN is not
        return f"the loss is {other[0]:.6g} in place of {one[0]:.6g}"
    difference = float((one[1] - other[1]).abs().max())
    return "" if difference <= 1e-7 * scale else f"the gradient is off by {difference / scale:.1%} of its largest entry"


def _cuts(batch: _Batch) -> Iterator[list[list[int]]]:
    """Ways to cut the batch, among them one with empty micro-batches."""
    everyone = list(range(len(batch.lengths)))
    yield [everyone[::2], everyone[1::2]]
    yield [[i] for i in reversed(everyone)]
    yield [[], everyone[:3], [], everyone[3:]]


def _form(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    objective.token_loss(batch.tokens(range(len(batch.lengths))))
    yield ""


def _finite(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    everyone = range(len(batch.lengths))
    far = torch.where(torch.arange(sum(batch.lengths)) % 2 == 0, -200.0, 200.0).double()
    others: dict[str, Any] = {
        name: batch.columns[name] + far for name in ("rollout_logprobs", "old_logprobs", "reference_logprobs")
    }
    nan = torch.full_like(far, torch.nan)
    padding: dict[str, Any] = dict.fromkeys((*others, "advantages"), nan)
    for words, tokens in (
        ("log-probs that differ by 200", batch.tokens(everyone, **others)),
        ("padding", batch.tokens(everyone, weights=torch.zeros_like(far), **padding)),
        ("an empty micro-batch", batch.tokens([])),
    ):
        value, gradient, _ = _run(objective, batch, [tokens])
        if not np.isfinite(value) or not gradient.isfinite().all():
            yield f"with {words} loss or gradient are not finite: clamp log-ratios before exp (loss.ratio does)"
        if words != "log-probs that differ by 200" and (value or gradient.any()):
            yield f"{words} has a loss: it must be exactly 0 where tokens.weights is"


def _linear(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    everyone = range(len(batch.lengths))
    value, gradient, _ = _run(objective, batch, [batch.tokens(everyone)])
    twice = batch.tokens(everyone, weights=2 * batch.columns["weights"])
    if wrong := _differs((2 * value, 2 * gradient, {}), _run(objective, batch, [twice])):
        yield (
            f"with all weights doubled {wrong}. Multiply each token's value by tokens.weights (a KL term's by "
            "tokens.shares) and take the sum: no mean, no division by a number of tokens"
        )


def _split(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    whole = _run(objective, batch, [batch.tokens(range(len(batch.lengths)))])
    for cut in _cuts(batch):
        if wrong := _differs(whole, _run(objective, batch, [batch.tokens(part) for part in cut])):
            yield (
                f"in {len(cut)} micro-batches {wrong}. What a token adds must depend on its own sequence alone: no "
                "mean, maximum or normalisation over the tokens of a micro-batch"
            )


def _cut(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    everyone = range(len(batch.lengths))
    whole = _run(objective, batch, [batch.tokens(everyone)])
    box: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2, timeout=DEADLOCK_S)
    values: dict[int, torch.Tensor | Exception] = {}

    def rank(own: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            box[own] = tensor
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        try:
            values[own] = objective.token_loss(batch.tokens(everyone, slice(own, None, 2), reduce=reduce))[0]
        except Exception as error:
            values[own] = error
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batch.leaf.grad = None
    for value in values.values():
        if isinstance(value, Exception):
            raise value
    total = sum(value for value in values.values() if isinstance(value, torch.Tensor))
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert batch.leaf.grad is not None
    if wrong := _differs(whole, (total.item(), batch.leaf.grad, {})):
        yield f"{wrong}: a rank has a part of each sequence. Take means over sequences by tokens.sequence_mean(values)"


def _without(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    if objective.learns_without_advantage:
        return
    batch = _Batch.of(objective, groups)
    nothing = batch.tokens(range(len(batch.lengths)), advantages=torch.zeros(sum(batch.lengths)).double())
    value, gradient, _ = _run(objective, batch, [nothing])
    if value or gradient.any():
        yield "tokens whose advantage is 0 have a loss, and would be left out: set learns_without_advantage = True"


def _entropy(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    entropy = torch.ones(sum(batch.lengths), dtype=torch.float64, requires_grad=True)
    objective.token_loss(batch.tokens(range(len(batch.lengths)), entropy=entropy))[0].backward()
    if not batch.entropy_gradient and entropy.grad is not None and entropy.grad.any():
        yield "tokens.entropy has no gradient in a run: set needs_entropy_gradient = True, or take its detach()"


def _metrics(objective: Objective, groups: ScoredGroups) -> Iterator[str]:
    batch = _Batch.of(objective, groups)
    tokens = batch.tokens(range(len(batch.lengths)))
    hooks.metrics(objective.algorithm, groups, objective.advantages(groups))
    whole = _run(objective, batch, [tokens])[2]
    for cut in _cuts(batch):
        sums = _run(objective, batch, [batch.tokens(part) for part in cut])[2]
        for key in whole:
            if not np.isclose(whole[key], sums[key], rtol=1e-7, atol=1e-9, equal_nan=True):
                yield f"{key} is {sums[key]:.6g} in {len(cut)} micro-batches and {whole[key]:.6g} in one: give sums"
