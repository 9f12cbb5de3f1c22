"""A server's side of a collective refit: every rank of it takes what the trainer's ranks send for its own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.engines.collective.digest import Digest
from nemo_aapo.engines.collective.meeting import Meeting, boxes_of, failures_named, meet, open_store
from nemo_aapo.engines.collective.plan import PROTOCOL, Rendezvous
from nemo_aapo.engines.weights import WeightsId
from nemo_aapo.errors import WeightsError
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.mcore.state import weight_parts


class WeightReceiver:
    """One rank's part in it. Methods are collective over all ranks of the server."""

    def __init__(self, module: GPTModel, vocab_size: int, index: int, timeout_s: float) -> None:
        """
        Args:
            module: this rank's stage, whose weights are replaced in place.
            index: number of the server.
            timeout_s: the longest that the trainer is waited for.
        """
        self.index, self.timeout_s = index, timeout_s
        self._parts = weight_parts(module, vocab_size)
        self._stores: dict[str, dist.Store] = {}
        self._where: Rendezvous | None = None
        self._meeting: Meeting | None = None

    @contextmanager
    def meeting(self, where: Rendezvous, weights: WeightsId) -> Iterator[Callable[[], int]]:
        """Meet the trainer, if that was not done before. Inside, the call that takes the weights and proves them.

        That call returns the bytes of this rank's part.

        Nothing is touched before that call.

        Raises:
            ServerError: the trainer does not come, or ends in the middle.
            WeightsError: the two models do not fit; or what came is not what the trainer has.
        """
        if self._where != where:
            self.close()
            self._meeting, self._where = self._met(where), where
        try:
            yield lambda: self._take(weights)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all connections."""
        if self._meeting is not None:
            self._meeting.close()
        self._meeting = self._where = None

    def _met(self, where: Rendezvous) -> Meeting:
        if where.protocol != PROTOCOL:
            raise WeightsError(f"the trainer sends by protocol {where.protocol}, this server takes {PROTOCOL}")
        if where.address not in self._stores:
            self._stores = {where.address: open_store(where.address, self.timeout_s)}
        return meet(
            self._stores[where.address],
            where,
            rank=where.senders + dist.get_rank(),
            boxes=boxes_of(self._parts),
            device=self._parts[0].tensor.device,
            server=self.index,
            timeout_s=self.timeout_s,
        )

    def _take(self, weights: WeightsId) -> int:
        assert self._meeting is not None, "called inside ``meeting``"
        sums = Digest()
        exchange, rank = self._meeting.exchange, self._meeting.senders + dist.get_rank()
        with failures_named("receiving weights"):  # one rank may lose a sender that the others have nothing from
            agree(lambda: exchange(rank, self._parts, each=sums.add))
        if (has := sums.of_all_ranks()) != weights.digest:
            raise WeightsError(
                f"rank {parallel.rank()}: {weights} did not arrive as the trainer has it: its digest here is {has}"
            )
        return sum(part.tensor.nbytes for part in self._parts)
