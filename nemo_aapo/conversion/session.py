"""The ranks of a conversion: how many a layout needs, and the groups they work in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nemo_aapo.distributed.lost_ranks import lost_ranks_reported
from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

TIMEOUT_S = 1800.0
"""Seconds that a rank waits for another one."""


@contextlib.contextmanager
def session(tensor_parallel_size: int, pipeline_parallel_size: int, expert_parallel_size: int = 1) -> Iterator[None]:
    """Inside, this process is a rank of the layout; torchrun's variables say which, alone without them."""
    initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        expert_model_parallel_size=expert_parallel_size,
        seed=0,  # nothing is drawn but weights that are overwritten
        timeout_s=TIMEOUT_S,
    )
    try:
        with lost_ranks_reported(lambda: "the conversion"):
            yield
    finally:
        destroy_model_parallel()
