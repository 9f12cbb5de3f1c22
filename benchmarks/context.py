"""What a training step on one long sequence holds in memory: whole on one rank, and cut over two."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import profile, ranks
from benchmarks.workload import Workload, make_input

PROMPT = 64
"""Tokens of the prompt; the rest of the sequence is trained on."""
LAYOUTS = ((2, 1), (2, 2), (1, 1), (1, 2))
"""Key-value heads, context-parallel size: two ranks exchange two heads, and gather a single one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the model and of the sequence."""

    tokens: int = 8192
    hidden_size: int = 256
    layers: int = 2


QUICK = Plan(tokens=512, hidden_size=64, layers=1)


@dataclass(frozen=True, slots=True)
class Row:
    """The rank that needs most memory, on one layout."""

    key_value_heads: int
    context_parallel_size: int
    tokens: int
    row_tokens: int
    """Of the sequence on a rank."""
    step_bytes: int
    """Most that tensors took beyond weights, gradients and optimizer state."""
    resident_bytes: int
    """Most that the process took beyond what it had when the step began."""
    loss: float


def measure(plan: Plan, folder: Path) -> list[Row]:
    """A row for each of ``LAYOUTS``, each in processes of its own."""
    rows = []
    for heads, size in LAYOUTS:
        place = folder / f"heads_{heads}"
        if not place.exists():
            place.mkdir(parents=True)
            workload = Workload(plan.hidden_size, plan.layers, key_value_heads=heads, positions=plan.tokens)
            make_input(workload, place)
        found = ranks.run(step, place, heads, size, plan.tokens, world=size, cp=size)
        rows.append(max(found, key=lambda row: row.step_bytes))
    return rows


def step(folder: Path, heads: int, size: int, tokens: int) -> Row:
    """An optimizer step, after one that leaves gradients and moments. Collective."""
    import torch

    from nemo_aapo.config import pad_multiple
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.distributed import parallel
    from nemo_aapo.learner.microbatch import PrefixGroup, collate
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.training.build import build_policy
    from nemo_aapo.types import Sample

    words = [
        "experiment=quickstart",
        "algorithm=gpg",
        f"run.dir={folder / 'run'}",
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.validation={folder / 'validation.jsonl'}",
        f"trainer.devices={size}",
        f"model.context_parallel_size={size}",
        f"max_tokens_per_microbatch={tokens}",
    ]
    job = resolve(load_config(words), size, given=("rewards",))
    policy = build_policy(job, trains=True)
    ids = np.random.default_rng(0).integers(2, 90, tokens).astype(np.int32)

    def train(length: int) -> float:
        sample = Sample(ids[:PROMPT], ids[PROMPT:length], np.zeros(length - PROMPT, np.float32), 1.0)
        batch = collate(
            [PrefixGroup((sample,))],
            [1.0 / length],
            multiple=pad_multiple(policy.config),
            device=torch.device("cpu"),
            packed=True,
            context_parallel_size=parallel.context_parallel_size(),
        )
        sums = policy.optimization.train_step([batch], lambda logprobs, _, b: (-(b.weights * logprobs).sum(), {}))
        return sums["loss"]

    train(2 * PROMPT)
    loss = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step_bytes = profile.peak_bytes(lambda: loss.append(train(tokens)))
    resident = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return Row(heads, size, tokens, tokens // size, step_bytes, resident, loss[0])


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells. A row is compared with the sequence as a whole on one rank."""
    header = ("attention", "ranks", "tokens of a rank", "tensors of a step, MiB", "process, MiB more", "to one rank")
    whole = {row.key_value_heads: row for row in rows if row.context_parallel_size == 1}
    cells: list[tuple[str, ...]] = []
    for row in rows:
        exchanged = row.key_value_heads % row.context_parallel_size == 0
        how = "whole" if row.context_parallel_size == 1 else "heads exchanged" if exchanged else "keys, values gathered"
        heads = f"{row.key_value_heads} key-value head{'s' * (row.key_value_heads > 1)}"
        ratio = row.step_bytes / whole[row.key_value_heads].step_bytes
        sizes = (f"{row.step_bytes / 2**20:,.0f}", f"{row.resident_bytes / 2**20:,.0f}")
        cells.append((f"{heads}, {how}", str(row.context_parallel_size), f"{row.row_tokens:,}", *sizes, f"{ratio:.2f}"))
    return header, cells
