"""The in-process engine with and without speculation, where completions repeat themselves and where they don't.

One random model each. A repetitive one says after a token, with a chance of 0.99, the next one of the token's cycle of
16, a less repetitive one with 0.7; prompts say such cycles, too. The last samples from a softmax that knows nothing of
what was said. Completions have fixed lengths, and there are three times as many as rows. Tokens have to be the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import generate
from benchmarks.measure import Figure, in_turns, ratio
from nemo_aapo.types import SamplingSpec
from nemo_aapo.utils import tables

CYCLE = 16
CHANCES = {"repetitive": 0.99, "less repetitive": 0.7, "random": None}
"""Completions -> the chance of the next token of the cycle; None: that of any token."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    hidden_sizes: tuple[int, ...] = (128, 256)
    layers: int = 4
    rows: tuple[int, ...] = (64, 16, 8)
    """Sequences that run at a time."""
    new_tokens: int = 128
    waves: int = 3
    repeats: int = 5


QUICK = Plan(hidden_sizes=(64,), layers=2, rows=(8,), new_tokens=32, repeats=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    model: str
    completions: str
    rows: int
    ratio_cpu: Figure
    """CPU seconds without speculation over those with it."""
    own_share: float
    """Of the time with speculation, what looking at tokens and guessing takes: the loss where nothing is fed."""
    accepted_fraction: float
    acceptance_rate: float | None
    """None: there were no drafts."""


def compare(plan: Plan, folder: Path) -> list[Row]:
    """Compare every model, kind of completions and number of rows.

    Args:
        folder: gets the models' files.
    """
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.models.directory import read_model_dir

    lines = []
    for size, (completions, chance) in itertools.product(plan.hidden_sizes, CHANCES.items()):
        path = folder / f"speculation_{size}_{chance}"
        generate.random_model(generate.Plan(layers=plan.layers), size, path)
        if chance is not None:
            _say_cycles(path, chance)
        policy = MegatronPolicy(decide(generate.config_of(path), Machine.present()), read_model_dir(str(path)))
        for rows in plan.rows:
            budget = rows * (2 * CYCLE + plan.new_tokens)
            plain, fast = (
                MegatronEngine(policy.module, generate.VOCABULARY, budget, speculation=on) for on in (False, True)
            )
            lines.append(_compare(plan, f"d = {size}", completions, rows, plain, fast))
    return lines


def _compare(plan: Plan, model: str, completions: str, rows: int, plain: Any, fast: Any) -> Row:
    count = rows * plan.waves
    starts = np.random.default_rng(0).integers(generate.VOCABULARY, size=(count // generate.GROUP, 1))
    prompts = list((starts // CYCLE * CYCLE + (starts + np.arange(2 * CYCLE)) % CYCLE).astype(np.int32))
    seeds = np.arange(count).reshape(-1, generate.GROUP).tolist()
    spec = SamplingSpec(temperature=1.0, max_new_tokens=plan.new_tokens, stop_token_ids=())
    runs = {
        name: functools.partial(engine.generate, prompts, spec, seeds)
        for name, engine in (("plain", plain), ("fast", fast))
    }
    tokens = [[completion.token_ids.tolist() for row in run() for completion in row] for run in runs.values()]
    assert tokens[0] == tokens[1], "speculation changed a token"
    timings = in_turns(runs, plan.repeats)
    stats = fast.stats
    return Row(
        model=model,
        completions=completions,
        rows=rows,
        ratio_cpu=ratio(timings["plain"], timings["fast"], "cpu"),
        own_share=_own_share(runs["fast"]),
        accepted_fraction=stats.accepted / stats.tokens,
        acceptance_rate=stats.accepted / stats.drafted if stats.drafted else None,
    )


def _own_share(run: Callable[[], object]) -> float:
    """The part of a run's seconds that ``Speculation`` takes."""
    from nemo_aapo.engines.megatron.speculation import Speculation

    spent = 0.0

    def timed(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                spent += time.perf_counter() - began

        return call

    with contextlib.ExitStack() as stack:
        for name in ("__init__", "learn", "feed"):
            stack.enter_context(mock.patch.object(Speculation, name, timed(getattr(Speculation, name))))
        began = time.perf_counter()
        run()
        return spent / (time.perf_counter() - began)


def _say_cycles(path: Path, chance: float) -> None:
    """Change a model's files so that each token's logits name its successor in the cycle."""
    import torch
    from safetensors.torch import load_file, save_file

    [file] = path.glob("*.safetensors")
    tensors = load_file(file)
    embedding = 50 * tensors["model.embed_tokens.weight"]  # so that layers change little of it
    vocabulary, size = embedding.shape
    # A norm gives the token's direction a length of sqrt(size), and all others a spread of 1 along it.
    odds = np.log(vocabulary * chance / (1 - chance))
    strength = size**0.5 - (size - 2 * odds) ** 0.5
    token = torch.arange(vocabulary)
    head = torch.zeros_like(embedding)
    head[token // CYCLE * CYCLE + (token + 1) % CYCLE] = strength * torch.nn.functional.normalize(embedding)
    save_file(
        tensors | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}, file, metadata={"format": "pt"}
    )


def report(rows: Sequence[Row]) -> str:
    """The table."""
    header = (
        "model",
        "completions",
        "rows",
        "plain over speculation, CPU time",
        "own share",
        "accepted",
        "of the drafts",
    )
    lines = [
        (
            row.model,
            row.completions,
            str(row.rows),
            row.ratio_cpu.text(2),
            f"{row.own_share:.1%}",
            f"{row.accepted_fraction:.2f}",
            "no drafts" if row.acceptance_rate is None else f"{row.acceptance_rate:.2f}",
        )
        for row in rows
    ]
    return tables.plain(header, lines)
