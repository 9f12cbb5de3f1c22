"""CUDA IPC without CUDA: files in shared memory in place of allocations, and all else as torch has it.

``share_on_gpu`` makes the handles that torch makes of GPU memory, argument for argument, and ``open_tensor`` takes the
place of ``torch.multiprocessing.reductions.rebuild_cuda_tensor``, in whatever process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from pathlib import Path

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from nemo_aapo.engines.ipc import memory

FOLDER = Path("/dev/shm")


def share_on_gpu(bucket, device, name):
    """As ``nemo_aapo.engines.ipc.memory.share_on_gpu``."""
    path = FOLDER / f"nemo_aapo_test-{os.getpid()}-{secrets.token_hex(8)}"

    def allocate(size):
        path.write_bytes(bytes(max(size, 1)))
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    views = memory.flat(bucket, allocate)
    handles = [memory.handle_of(tensor, view, arguments(view, path)) for tensor, view in views]
    shared = memory.Bucket(name, handles, views)
    weakref.finalize(shared, path.unlink)
    return shared


def arguments(view, path):
    """What torch tells of a tensor on a GPU: ``reduce_tensor(view)[1]``."""
    size = view.untyped_storage().nbytes()
    place = (0, os.fsencode(path), size, 0)
    readers = (b"counters", 0, b"event", True)
    layout = (torch.Tensor, view.size(), view.stride(), view.storage_offset(), torch.storage.TypedStorage)
    return (*layout, view.dtype, *place, False, *readers)


def open_tensor(function, given):
    """The tensor that a worker opens by a handle."""
    assert function is rebuild_cuda_tensor
    cls, size, stride, offset, storage_cls, dtype, device, handle, nbytes, begin, grad, *readers = given
    assert (cls, storage_cls, begin, grad) == (torch.Tensor, torch.storage.TypedStorage, 0, False)
    assert isinstance(device, int)
    assert readers == [b"counters", 0, b"event", True]
    content = torch.from_file(os.fsdecode(handle), shared=True, size=nbytes, dtype=torch.uint8)
    return torch.as_strided(content.view(dtype), size, stride, offset)


def left_behind():
    """Names of the memory of this process that nobody has given back."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in FOLDER.glob(f"nemo_aapo_test-{os.getpid()}-*"))
    return []
