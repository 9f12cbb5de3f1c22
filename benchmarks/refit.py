"""What a refit of two rollout servers costs by files, by what changed, and from memory to memory: seconds and bytes.

Real servers, a real fleet, one trainer's rank, all on this machine. In between its weights change as by a step of Adam
at a learning rate of 1e-6. ``collective`` and ``ipc`` hand over what the model holds, fp32 on a CPU; ``delta`` is
measured on bf16, which it is made for, beside ``files`` of the same.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.refits import server
from benchmarks.workload import Workload, make_input

KINDS = (("files", "fp32"), ("collective", "fp32"), ("ipc", "fp32"), ("files", "bf16"), ("delta", "bf16"))
LEARNING_RATE = 1e-6
WAIT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """The model, and how often it is handed over."""

    workload: Workload
    servers: int = 2
    refits: int = 5
    """Of each kind; the first, which meets or writes the whole, is left out."""


FULL = Plan(Workload(hidden_size=512, layers=6, vocabulary=4096))
QUICK = Plan(Workload(), refits=2)


@dataclass(frozen=True)
class Row:
    """One kind of refit."""

    kind: str
    dtype: str
    """Of what travels."""
    parameters: int
    seconds: float
    """Median, until all servers serve the new weights."""
    slowest: float
    bytes: int
    """Written to the directory, or sent to all servers; median."""


def measure(plan: Plan, folder: Path) -> list[Row]:
    """A row for each kind; the servers prove each time that they have what was sent."""
    make_input(plan.workload, folder)
    with ExitStack() as servers:
        for index in range(plan.servers):
            servers.enter_context(server(folder, index))
        return _rows(plan, folder)


def _rows(plan: Plan, folder: Path) -> list[Row]:
    from nemo_aapo.config.compose import load_config
    from nemo_aapo.engines.build import build_hosted_engine, build_sender
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.bridge.weights import WeightMap
    from nemo_aapo.models.directory import read_model_dir

    words = [f"model.path={folder}/model", f"run.dir={folder}/run", "experiment=quickstart", "rollout.engine=remote"]
    words += [f"data.{part}={folder}/{part}.jsonl" for part in ("train", "validation")]
    words += [f"rollout.remote.servers={plan.servers}", f"rollout.remote.min_servers={plan.servers}"]
    config = decide(load_config([*words, f"rollout.remote.wait_s={WAIT_S}"]), Machine.present())
    shape = read_model_dir(config.model.path)
    module: Any = build_hosted_engine(config, shape).engine.model  # type: ignore[attr-defined]
    weights = WeightMap(config.model.path, precision.dtype(config))
    rows, version = [], 0
    for kind, dtype in KINDS:
        config = load_config([*words, f"rollout.refit={kind}"])
        export = functools.partial(weights.export, module)
        engine = RemoteEngine.from_config(config, build_sender(config, module, shape.vocab_size, export))
        seconds, sizes = [], []
        for _ in range(plan.refits + 1):
            version += 1
            _step(module, version)
            began = time.perf_counter()
            engine.update_weights(_as(weights.export(module), dtype), version)
            seconds.append(time.perf_counter() - began)
            sizes.append(engine.refit_bytes)
        engine.close()
        count = sum(parameter.numel() for parameter in module.parameters())
        rows.append(
            Row(kind, dtype, count, statistics.median(seconds[1:]), max(seconds[1:]), statistics.median_low(sizes[1:]))
        )
    return rows


def _step(module: Any, seed: int) -> None:
    """Move every weight by the learning rate, as Adam's first steps do, in a direction of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(LEARNING_RATE * torch.randn(parameter.shape, generator=generator).sign())


def _as(tensors: Iterator[tuple[str, Any]], dtype: str) -> Iterator[tuple[str, Any]]:
    return ((name, tensor.bfloat16() if dtype == "bf16" else tensor) for name, tensor in tensors)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; each kind beside ``files`` of the same numbers."""
    files = {row.dtype: row for row in rows if row.kind == "files"}
    header = ["rollout.refit", "weights", "seconds, median", "slowest", "to files", "MB", "to files"]
    cells = [
        [
            row.kind,
            f"{row.parameters / 1e6:.1f} M in {row.dtype}",
            f"{row.seconds:.2f}",
            f"{row.slowest:.2f}",
            f"{row.seconds / files[row.dtype].seconds:.2f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.bytes / files[row.dtype].bytes:.3f}",
        ]
        for row in rows
    ]
    return header, cells
