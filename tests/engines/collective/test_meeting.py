"""A meeting of trainer and server that does not come about: each side says why, within its deadline."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_aapo.engines.collective import meeting, receiver
from nemo_aapo.engines.collective.plan import PROTOCOL, Box, Rendezvous
from nemo_aapo.engines.weights import WeightsId
from nemo_aapo.errors import ServerError, WeightsError

BOXES = [Box("w", (0,), (4,), "float32")]
WAIT_S = 0.3
LONG_S = 60.0
"""Longer than a wait of ``WAIT_S`` takes on a busy machine, and shorter than those that know no deadline."""


def meet(store: dist.Store, **changes) -> meeting.Meeting:
    """As rank 0 of a trainer of one rank meets a server of one."""
    store.set("senders/0", meeting.packed(BOXES))
    told = {"rank": 0, "boxes": BOXES, "device": torch.device("cpu"), "server": 0, "timeout_s": WAIT_S, **changes}
    return meeting.meet(store, Rendezvous("nowhere:1", "name", 1, 1), **told)


def test_a_meeting_that_nobody_comes_to_ends_with_who_is_missing():
    began = time.monotonic()
    with pytest.raises(ServerError, match="not all ranks came to the meeting in time: name/receivers are missing"):
        meet(dist.HashStore())
    assert time.monotonic() - began < LONG_S


def test_who_is_told_why_the_other_side_does_not_come_waits_no_longer():
    store, began = dist.HashStore(), time.monotonic()
    store.set("name/failed", "HTTP 401: a valid bearer token is needed")
    with pytest.raises(ServerError, match="HTTP 401: a valid bearer token is needed"):
        meet(store, timeout_s=10 * LONG_S)
    assert time.monotonic() - began < LONG_S


def test_a_rank_that_said_that_it_comes_and_is_gone_is_not_waited_for_longer_than_the_deadline():
    store, began = dist.HashStore(), time.monotonic()
    store.set("name/receivers/0", meeting.packed(BOXES))
    with pytest.raises(ServerError, match="the ranks could not be connected"):
        meet(store)
    assert time.monotonic() - began < LONG_S


def test_a_server_says_that_the_trainers_store_is_not_there():
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"the trainer's store at 127\.0\.0\.1:1 can't be reached"):
        meeting.open_store("127.0.0.1:1", WAIT_S)
    assert time.monotonic() - began < LONG_S


def test_a_server_of_another_protocol_refuses_before_it_meets_anybody(monkeypatch):
    monkeypatch.setattr(receiver, "weight_parts", lambda module, vocab_size: [])
    server = receiver.WeightReceiver(None, 0, 0, WAIT_S)
    where = Rendezvous("127.0.0.1:1", "name", 1, 1, protocol=PROTOCOL + 1)
    refusal = pytest.raises(WeightsError, match=f"sends by protocol {PROTOCOL + 1}, this server takes {PROTOCOL}")
    with refusal, server.meeting(where, WeightsId(1, "0" * 16)):
        pass


def _second_of_two_ranks_loses_the_trainer():
    def exchange(rank, parts, each):
        if dist.get_rank() == 1:
            raise RuntimeError("Connection reset by peer")

    server = receiver.WeightReceiver.__new__(receiver.WeightReceiver)
    server._meeting, server._parts = SimpleNamespace(senders=1, exchange=exchange), []
    with pytest.raises(ServerError) as raised:
        server._take(WeightsId(1, "0" * 16))
    return str(raised.value)


def test_a_sender_that_only_one_rank_of_a_server_loses_fails_the_refit_on_all_of_them(ranks):
    said = ranks.run(_second_of_two_ranks_loses_the_trainer, world=2, tp=None)
    assert said == ["receiving weights failed (Connection reset by peer)"] * 2


def test_nccl_gets_a_group_beside_the_jobs_whose_own_deadline_comes_after_ours(monkeypatch):
    """Never run: what torch's own class takes, as it is called on a GPU."""
    asked = []

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, store, rank, size, options):
            asked.append((rank, size, options._timeout))

    monkeypatch.setattr(meeting.dist, "ProcessGroupNCCL", Nccl, raising=False)
    meeting.new_group(dist.HashStore(), 2, 3, torch.device("cuda"), 40.0)
    assert asked == [(2, 3, timedelta(seconds=80))]


def test_on_a_gpu_a_move_that_does_not_end_is_given_up_by_us(monkeypatch):
    """Never run: NCCL's ``wait`` only orders streams, so that completion is asked for."""
    looks = iter([False, False, True])
    done = SimpleNamespace(is_completed=lambda: next(looks), wait=lambda: None)
    stuck = SimpleNamespace(is_completed=lambda: False, wait=lambda: None)
    part, on_gpu = SimpleNamespace(tensor=None), SimpleNamespace(is_cuda=True)
    assert meeting._Transfer(part, on_gpu, done, sends=True).end(WAIT_S) is part
    with (
        pytest.raises(ServerError, match=r"sending weights failed .*nothing came for 0\.3 s"),
        meeting.failures_named("sending weights"),
    ):
        meeting._Transfer(part, on_gpu, stuck, sends=True).end(WAIT_S)
