"""Runs a function on the ranks of a layout, on this machine, with a process for each rank."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT_S = 600.0
"""A rank waits so long for another one."""


def run(
    function: Callable[..., Any], *arguments: Any, world: int = 1, tp: int = 1, pp: int = 1, cp: int = 1
) -> list[Any]:
    """Results of a module's function by rank, called in Megatron's groups over gloo.

    Raises:
        Exception: that of the first rank that failed; the others end at their deadline.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        store = str(Path(folder) / "store")
        calls = [pool.submit(_rank, function, arguments, rank, world, (tp, pp, cp), store) for rank in range(world)]
        return [call.result() for call in calls]


def _rank(
    function: Callable[..., Any], arguments: Any, rank: int, world: int, layout: tuple[int, int, int], store: str
) -> Any:
    import datetime

    from nemo_aapo.utils.libraries import importing, quiet

    quiet()
    with importing():
        import torch
        import torch.distributed as dist

        from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

    tp, pp, cp = layout
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timeout)
    try:
        initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            seed=0,
            timeout_s=TIMEOUT_S,
        )
        return function(*arguments)
    finally:
        destroy_model_parallel()
