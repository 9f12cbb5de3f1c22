"""Products of a decoding step: how far each layout of a weight is from a large product's speed.

A product's weights are many enough that no cache holds them, as in a rollout, and are taken one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import in_turns
from benchmarks.peers.plan import SIZES, Model
from nemo_aapo.engines.megatron import matmul

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as the learner keeps it": lambda weight: weight,
    "blocks": matmul.in_blocks,
    "oneDNN": matmul.for_onednn,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    model: Model = SIZES["135M"]
    rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    threads: tuple[int, ...] = (1, 2)
    weight_bytes: int = 1 << 26
    """Of all weights of a product; at least two weights."""
    peak_size: int = 1024
    """Rows, columns and depth of the large product."""
    repeats: int = 15


QUICK = Plan(Model("tiny", 32, 2, 64, 256), rows=(2,), threads=(1,), weight_bytes=1 << 16, peak_size=64, repeats=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: 10^9 floating-point operations a second."""

    threads: int
    product: str
    rows: int
    layouts: dict[str, float]
    peak: float
    """Of the large product, in the same turns."""


def measure(plan: Plan) -> list[Row]:
    """Every product of a decoding step, in every layout, by turns."""
    model = plan.model
    head = model.hidden_size // model.heads
    shapes = {  # inputs, outputs
        "query, key, value": (model.hidden_size, (model.heads + 2 * model.key_value_heads) * head),
        "attention's output": (model.heads * head, model.hidden_size),
        "gate, up": (model.hidden_size, 2 * model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
        "output layer": (model.hidden_size, model.vocabulary),
    }
    rows = []
    for threads in plan.threads:
        torch.set_num_threads(threads)
        for product, (inputs, outputs) in shapes.items():
            rows += _product(plan, threads, product, inputs, outputs)
    return rows


@torch.inference_mode()
def _product(plan: Plan, threads: int, product: str, inputs: int, outputs: int) -> list[Row]:
    count = max(2, plan.weight_bytes // (4 * inputs * outputs))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    laid_out = {name: [layout(weight) for weight in weights] for name, layout in LAYOUTS.items()}
    large = torch.randn(plan.peak_size, plan.peak_size, generator=generator)
    found = []
    for rows in plan.rows:
        x = torch.randn(rows, inputs, generator=generator)
        runs = {name: functools.partial(_all, x, each) for name, each in laid_out.items()}
        timings = in_turns({**runs, "peak": lambda: large @ large}, plan.repeats)
        seconds = {name: median(timing.wall for timing in of_one) for name, of_one in timings.items()}
        speeds = {name: 2e-9 * rows * inputs * outputs * count / seconds[name] for name in runs}
        found.append(Row(threads, product, rows, speeds, 2e-9 * plan.peak_size**3 / seconds["peak"]))
    return found


def _all(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        matmul.linear(x, weight)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; each layout with its part of the large product's speed."""
    header = ["threads", "product", "rows", *LAYOUTS, "large product"]
    return header, [
        [
            str(row.threads),
            row.product,
            str(row.rows),
            *(f"{speed:.0f} ({speed / row.peak:.2f})" for speed in row.layouts.values()),
            f"{row.peak:.0f}",
        ]
        for row in rows
    ]
