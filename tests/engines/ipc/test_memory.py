"""Memory of one process in another: what comes is what was there, what is forged is refused, nothing stays behind."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import socket
import threading
import time

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.channel import Channel, connect
from nemo_aapo.engines.ipc.receiver import ArrivingTensors, SharedBucket
from nemo_aapo.errors import ServerError, WeightsError
from tests import cuda_ipc

CPU = torch.device("cpu")
TENSORS = [
    ("a", torch.arange(15, dtype=torch.float32).reshape(3, 5).t()),
    ("b", torch.ones(7, dtype=torch.bfloat16)),
    ("scalar", torch.tensor(3.5, dtype=torch.float16)),
    ("none", torch.empty(0, 4)),
]


@pytest.fixture
def shared():
    bucket = memory.share(list(TENSORS), CPU, memory.HOST)
    yield bucket
    bucket.close()


def as_received(bucket):
    """A bucket as it comes over a connection."""
    descriptor = None if bucket.descriptor is None else os.dup(bucket.descriptor)
    return SharedBucket(json.loads(json.dumps(bucket.told())), descriptor)


def test_the_tensors_are_the_exporters_and_what_is_done_with_them_does_not_reach_it(shared):
    tensors = as_received(shared).tensors_on(CPU, memory.HOST)
    assert [name for name, _ in tensors] == [name for name, _ in TENSORS]
    for (_, found), (_, given) in zip(tensors, TENSORS, strict=True):
        assert found.dtype == given.dtype
        assert torch.equal(found, given)
    tensors[0][1].zero_()
    assert torch.equal(shared.tensors[0][1], TENSORS[0][1])
    shared.close()  # and the memory that a reader has mapped stays its own
    assert torch.equal(tensors[1][1], TENSORS[1][1])


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"offset": 1 << 40}, "its tensors need"),
        ({"offset": -1}, "no weight has"),
        ({"shape": [1 << 30, 1 << 30]}, "its tensors need"),
        ({"shape": [-1]}, "no weight has"),
        ({"shape": "3"}, "can't be read"),
        ({"dtype": "hub"}, "no weight has"),
        ({"more": 1}, "can't be read"),
        ({"name": "b"}, "did not arrive"),
        ({"shape": [3, 5]}, "did not arrive"),
    ],
)
def test_handles_that_are_not_the_exporters_are_refused(shared, forged, message):
    received = as_received(shared)
    received.parts[memory.HOST]["handles"][0].update(forged)
    with pytest.raises(WeightsError, match=message):
        received.tensors_on(CPU, memory.HOST)


def test_a_bit_that_differs_and_weights_on_another_device_are_refused(shared):
    received = as_received(shared)
    shared.tensors[0][1][1, 1] += 1
    with pytest.raises(WeightsError, match="did not arrive as the trainer has it"):
        received.tensors_on(CPU, memory.HOST)
    with pytest.raises(WeightsError, match="sent nothing of what lies on GPU-7"):
        received.handles_on("GPU-7")


def test_a_handle_of_cuda_memory_is_what_torch_tells_its_own_processes_and_nothing_is_unpickled(tmp_path):
    """Never run on CUDA: the arguments are torch's by its signature."""
    view = torch.zeros(64, dtype=torch.bfloat16)[16:40].view(4, 6)
    given = cuda_ipc.arguments(view, tmp_path / "allocation")
    assert len(given) == len(inspect.signature(rebuild_cuda_tensor).parameters)
    names = [*inspect.signature(rebuild_cuda_tensor).parameters]
    assert names[6:10] == ["storage_device", "storage_handle", "storage_size_bytes", "storage_offset_bytes"]
    assert names[11:] == ["ref_counter_handle", "ref_counter_offset", "event_handle", "event_sync_required"]
    handle = memory.handle_of("w", view, given)
    (read,) = memory.decode(json.loads(json.dumps([dataclasses.asdict(handle)])))
    assert read == handle
    function, arguments = read.rebuilt_by(3)
    assert function is rebuild_cuda_tensor
    assert arguments == (*given[:6], 3, *given[7:])


def test_tensors_come_as_they_are_asked_for_and_what_is_passed_over_is_kept():
    pairs = iter([("a", torch.zeros(1)), ("b", torch.ones(2)), ("c", torch.ones(3))])
    tensors = ArrivingTensors(pairs, {"a", "b", "c", "d"})
    assert "d" in tensors
    assert len(tensors["b"]) == 2
    assert len(tensors["a"]) == 1
    tensors.read_on()
    assert tensors.nbytes == 24
    with pytest.raises(WeightsError, match="d did not come"):
        tensors["d"]
    with pytest.raises(KeyError):
        tensors["e"]


def test_addresses_that_lead_nowhere_are_named(tmp_path):
    with pytest.raises(ServerError, match=r"can't be reached .*rollout.refit=ipc servers run on the trainer's machine"):
        connect(f"unix:{tmp_path}/weights", 1.0)
    with pytest.raises(WeightsError, match="files, delta or ipc only"):
        connect("127.0.0.1:9", 1.0)


def test_a_connection_says_who_is_gone_or_silent_and_closes_what_came_with_half_a_message():
    one, other = socket.socketpair()
    channel, peer = Channel(one, 0.3), Channel(other, 60.0)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no message .* for 0.3 s"):
        channel.receive()
    assert time.monotonic() - began < 60
    large = {"text": "x" * (1 << 22)}
    thread = threading.Thread(target=peer.send, args=(large, 0))
    thread.start()
    message, descriptor = Channel(one, 60.0).receive()
    thread.join()
    assert message == large
    os.close(descriptor)
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(other, [b"\x00\x00\x00\x08{"], [0])
    peer.close()
    with pytest.raises(ServerError, match="ended"):
        channel.receive()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    with pytest.raises(ServerError, match="broke"):
        channel.send({})
    channel.close()
