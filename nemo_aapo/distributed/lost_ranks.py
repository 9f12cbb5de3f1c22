"""Broken connections between ranks, in words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from nemo_aapo.errors import LostRankError


@contextmanager
def lost_ranks_reported(doing: Callable[[], str]) -> Iterator[None]:
    """Inside, a broken connection between ranks becomes an error that says so: gloo's and NCCL's name only sockets.

    Args:
        doing: what this rank is at, asked for once a connection broke.

    Raises:
        LostRankError: which of the others it was is not known here: what started the ranks sees it and says it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):  # gloo's have no class
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # without the place in gloo
        message = (
            f"rank {dist.get_rank()} of {dist.get_world_size()} ended at {doing()}: another rank is gone or did not "
            f"come within trainer.distributed_timeout_s. The rank that ended first says why ({reason})"
        )
        print(message, file=sys.stderr, flush=True)  # now: a launcher's SIGTERM may end this rank before its traceback
        raise LostRankError(message) from error
