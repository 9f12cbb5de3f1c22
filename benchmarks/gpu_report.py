"""The figures of ``benchmarks.gpu`` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_aapo.utils import tables


def report(found: dict[str, Any]) -> Iterator[str]:
    """Tables of the figures that ``gpu.measure`` returned."""
    ceiling = found["ceilings"]
    yield (
        f"{found['gpu']}, torch {found['torch']}: copies at {ceiling['bytes_per_s'] / 1e12:.2f} TB/s, bf16 products at "
        f"{ceiling['flops_per_s'] / 1e12:.0f} TFLOP/s"
    )
    base = {row["model"]: row["seconds"] for row in found["learner"] if row["precision"] == "bf16"}
    yield tables.plain(
        ("learner", "precision", "micro-batch", "tokens/s", "step", "MFU", "faster than bf16", "peak GiB"),
        [
            (
                row["model"],
                row["precision"],
                f"{row['micro_batch_tokens']:,}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['seconds'] * 1e3:.0f} ms",
                f"{row['mfu']:.2f}",
                f"{base[row['model']] / row['seconds']:.2f}",
                f"{row['peak_gib']:.1f}",
            )
            for row in found["learner"]
        ],
    )
    yield tables.plain(
        ("decoding", "rows", "tokens/s", "step", "floor", "share of floor"),
        [
            (
                row["model"],
                str(row["rows"]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['step_ms']:.2f} ms",
                f"{row['floor_ms']:.2f} ms",
                f"{row['share_of_floor']:.2f}",
            )
            for row in found["decode"]
        ],
    )
    yield tables.plain(
        ("parity", "precision", "mult_prob_error", "gen_kl"),
        [
            (
                row["model"],
                row["precision"],
                f"{row['parity/mult_prob_error']:.4f}",
                f"{row['parity/gen_kl']:.1e}",
            )
            for row in found["parity"]
        ],
    )
    logprobs = found["logprobs"]
    yield tables.plain(
        ("log-probs", "peak", "forward and backward"),
        [
            (name, f"{logprobs[f'{name}_peak_bytes'] / 2**30:.2f} GiB", f"{logprobs[f'{name}_seconds'] * 1e3:.0f} ms")
            for name in ("chunked", "plain")
        ],
    )
