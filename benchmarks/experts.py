"""What a layer of experts costs on a CPU: beside mcore's, one expert after the other, and a dense layer of equal FLOPs.

All hold weight gradients in a buffer, as in training. Tokens go through the whole layer: router, dispatcher, experts,
and back. The six products of each expert are timed alone too: no arrangement of the library's products is below that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, in_turns, ratio
from nemo_aapo.utils import tables


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the layer, and how often it is measured."""

    hidden: int = 512
    units: int = 192
    """Of an expert."""
    experts: int = 128
    per_token: int = 8
    tokens: tuple[int, ...] = (64, 512, 2048)
    repeats: int = 7


QUICK = Plan(hidden=64, units=16, experts=8, per_token=2, tokens=(16,), repeats=2)


@dataclass(frozen=True, slots=True)
class Row:
    """CPU time of a forward and a backward pass, as a multiple of the dense layer's."""

    tokens: int
    grouped: Figure
    one_by_one: Figure
    products: Figure
    dense_ms: float
    """Of the dense layer, median."""


def compare(plan: Plan, folder: Path) -> list[Row]:
    """Measure in turns, on one rank with Megatron's groups.

    Args:
        folder: where a model of one layer is written.
    """
    import torch
    from megatron.core.transformer.moe.experts import SequentialMLP

    layer = _layer_of_experts(plan, folder)
    dense = _dense(plan)
    forward = {"grouped": type(layer.experts).forward, "one by one": SequentialMLP.forward}
    rows = []
    for tokens in plan.tokens:
        x = torch.randn(tokens, 1, plan.hidden, generator=torch.Generator().manual_seed(tokens))

        def through(name: str, x: torch.Tensor = x) -> None:
            layer.experts.forward = forward[name].__get__(layer.experts)
            layer(x.clone().requires_grad_())[0].sum().backward()

        timings = in_turns(
            {
                "products": _products(plan, tokens),
                "grouped": lambda: through("grouped"),  # called before the next turn of the loop
                "one by one": lambda: through("one by one"),
                "dense": lambda: dense(x.clone().requires_grad_()).sum().backward(),  # noqa: B023
            },
            plan.repeats,
        )
        grouped, one_by_one, products = (
            ratio(timings[name], timings["dense"], "cpu") for name in ("grouped", "one by one", "products")
        )
        median = Figure.of([timing.cpu for timing in timings["dense"]]).median
        rows.append(Row(tokens, grouped, one_by_one, products, median * 1e3))
    return rows


def _products(plan: Plan, tokens: int) -> Callable[[], None]:
    """The matrix products of the experts' forward and backward pass into memory that is there: tokens spread evenly."""
    import torch

    rows, h, f = -(-tokens * plan.per_token // plan.experts), plan.hidden, plan.units
    shapes = [(2 * f, h), (h, f)] * plan.experts
    weights = [torch.randn(shape) * 0.02 for shape in shapes]
    gradients = [torch.zeros(shape) for shape in shapes]
    ends = {size: (torch.randn(rows, size), torch.empty(rows, size)) for size in (2 * f, h, f)}

    def run() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            (of_out, out), (of_in, into) = (ends[size] for size in weight.shape)
            torch.mm(of_in, weight.t(), out=out)
            torch.mm(of_out, weight, out=into)
            gradient.addmm_(of_out.t(), of_in)

    return run


def _layer_of_experts(plan: Plan, folder: Path) -> Any:
    import torch
    from transformers import Qwen3MoeConfig

    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.bridge.weights import WeightMap
    from nemo_aapo.mcore.model import build_stage

    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=64,
        hidden_size=plan.hidden,
        num_hidden_layers=1,
        num_attention_heads=plan.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=plan.experts,
        num_experts_per_tok=plan.per_token,
        moe_intermediate_size=plan.units,
        norm_topk_prob=True,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    fields = precision.machine_fields(torch.float32)
    module = build_stage(WeightMap(str(folder), torch.float32), fields)
    precision.fuse_weight_gradients(module)
    layer = module.decoder.layers[0].mlp
    _give_buffers(layer)
    return layer


def _dense(plan: Plan) -> Callable[[Any], Any]:
    """One layer whose units are those of all experts that a token is sent to."""
    import torch
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as product

    from nemo_aapo.distributed import parallel
    from nemo_aapo.mcore.cpu.kernels import swiglu

    units, group = plan.per_token * plan.units, parallel.groups().tensor
    layer = torch.nn.Module()
    up = layer.up = torch.nn.Parameter(torch.randn(2 * units, plan.hidden) * 0.02)
    down = layer.down = torch.nn.Parameter(torch.randn(plan.hidden, units) * 0.02)
    _give_buffers(layer)

    def linear(x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        return product(
            x, weight, None, gradient_accumulation_fusion=True, allreduce_dgrad=False, sequence_parallel=False,
            tp_group=group,
        )  # fmt: skip

    return lambda x: linear(swiglu(linear(x, up)), down)


def _give_buffers(layer: Any) -> None:
    """Weight gradients go where mcore's data parallelism would have them, and no copy stays."""
    import torch

    def drop(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
        parameter.register_post_accumulate_grad_hook(drop)


def report(rows: list[Row]) -> str:
    """A table for people."""
    head = ("tokens", "dense layer, ms", "experts together", "their products alone", "one after the other (mcore)")
    return tables.plain(
        head,
        [
            (str(row.tokens), f"{row.dense_ms:.1f}", *(f.text(2) for f in (row.grouped, row.products, row.one_by_one)))
            for row in rows
        ],
    )
