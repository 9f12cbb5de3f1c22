"""Memory that another process of this machine can open: buckets of weights, and the handles that say where they are.

A bucket is one flat buffer. On a GPU other processes open it by CUDA's IPC handles, as torch makes them; in host memory
by a file descriptor of a file without a name (``memfd_create``), so that nothing is left behind by whoever is killed.
Handles travel as JSON, and nothing of them is unpickled.
"""

from __future__ import annotations

import base64
import itertools
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nemo_aapo.config.build import build
from nemo_aapo.errors import ConfigError, WeightsError

NamedTensors = list[tuple[str, torch.Tensor]]
ALIGNMENT = 256
"""Each tensor begins at a multiple of so many bytes, as CUDA's allocator and its copies like it."""
HOST = "host"
"""The device of buckets in host memory; a GPU's is its UUID."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
"""Those that weights are computed with."""


@dataclass(frozen=True)
class CudaHandle:
    """What torch tells another process of CUDA memory that a tensor lies in; bytes are base64."""

    storage: str
    """CUDA's handle of the allocation, behind a byte that says which kind it is."""
    storage_bytes: int
    storage_offset: int
    """Byte of the allocation at which the storage begins."""
    counter: str
    """Name of the shared memory in which readers count themselves down."""
    counter_offset: int
    event: str
    """CUDA's handle of the event after which the memory may be read."""
    event_sync: bool


@dataclass(frozen=True)
class TensorHandle:
    """One tensor of a bucket. It is contiguous.

    Example: ``TensorHandle("model.norm.weight", "bfloat16", (896,), 512)``
    """

    name: str
    """Its Hugging Face name."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Byte of the bucket at which it begins."""
    cuda: CudaHandle | None = None
    """None: host memory, whose file descriptor comes beside the handles."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rebuilt_by(self, device: int) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        """The function of torch's by which a process opens it on a GPU, and its arguments.

        Args:
            device: the GPU's number in that process.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        assert self.cuda is not None, "host memory has no such function"
        dtype, cuda = DTYPES[self.dtype], self.cuda
        strides = torch.empty(self.shape, dtype=dtype, device="meta").stride()
        storage, counter, event = map(base64.b64decode, (cuda.storage, cuda.counter, cuda.event))
        place = (device, storage, cuda.storage_bytes, cuda.storage_offset)
        readers = (counter, cuda.counter_offset, event, cuda.event_sync)
        return rebuild_cuda_tensor, (
            *(torch.Tensor, torch.Size(self.shape), strides, self.offset // dtype.itemsize),
            *(torch.storage.TypedStorage, dtype, *place, False, *readers),
        )


@dataclass
class Bucket:
    """One bucket as its exporter holds it; it stays readable for as long as this object lives."""

    device: str
    """``HOST``, or the GPU's UUID."""
    handles: list[TensorHandle]
    tensors: NamedTensors
    """The copies in the buffer."""
    descriptor: int | None = None
    """Of host memory."""

    def told(self) -> dict[str, Any]:
        """Device -> what readers on it need, as JSON."""
        return {self.device: {"handles": [asdict(handle) for handle in self.handles], "digest": digest(self.tensors)}}

    def close(self) -> None:
        """Give it back; who has mapped host memory keeps it."""
        self.tensors.clear()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def flat(bucket: NamedTensors, allocate: Callable[[int], torch.Tensor]) -> NamedTensors:
    """Copies of the tensors, end to end in one new buffer.

    A handle names a whole allocation: a buffer of its own keeps the exporter's other tensors out of the reader's hands,
    and the reader maps one piece of memory a bucket instead of one a tensor.

    Args:
        allocate: a new uint8 tensor of so many bytes.
    """
    ends = list(itertools.accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in bucket))
    buffer = allocate(ends[-1] if ends else 0)
    views = []
    for (name, tensor), begin in zip(bucket, [0, *ends], strict=False):
        view = buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append((name, view.copy_(tensor.detach())))
    return views


def own_device() -> tuple[torch.device, str]:
    """Where this process computes, and what that is called in all processes of the machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), HOST
    device = torch.cuda.current_device()
    return torch.device("cuda", device), f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def give_back() -> None:
    """Let the driver have what readers have read and what torch keeps unused, so that others can take it."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()  # buffers that were let go stay in torch's hands until the reader's counters are seen
        torch.cuda.empty_cache()


def share(bucket: NamedTensors, device: torch.device, name: str) -> Bucket:
    """Copy a bucket into new memory on a device that other processes can open.

    Args:
        name: of the device, for readers.
    """
    return share_on_gpu(bucket, device, name) if device.type == "cuda" else _share_on_host(bucket)


def share_on_gpu(bucket: NamedTensors, device: torch.device, name: str) -> Bucket:
    """``share`` on a GPU. It is the one function of a refit that needs CUDA; the tests replace it."""
    from torch.multiprocessing.reductions import reduce_tensor

    views = flat(bucket, lambda size: torch.empty(size, dtype=torch.uint8, device=device))
    torch.cuda.synchronize(device)  # the reader has another stream
    # One call a tensor: the reader counts down one counter of references for each that it opens.
    return Bucket(name, [handle_of(tensor, view, reduce_tensor(view)[1]) for tensor, view in views], views)


def handle_of(name: str, view: torch.Tensor, arguments: Sequence[Any]) -> TensorHandle:
    """The handle of a tensor on a GPU.

    Args:
        arguments: of ``rebuild_cuda_tensor``, as ``torch.multiprocessing.reductions.reduce_tensor`` gives them.
    """
    *_, storage, size, begin, _, counter, counter_offset, event, sync = arguments
    storage, counter, event = (base64.b64encode(part).decode() for part in (storage, counter, event))
    cuda = CudaHandle(storage, size, begin, counter, counter_offset, event, sync)
    return TensorHandle(name, _dtype(view), tuple(view.shape), int(view.storage_offset()) * view.element_size(), cuda)


def _share_on_host(bucket: NamedTensors) -> Bucket:
    descriptor = os.memfd_create("weights", os.MFD_CLOEXEC)

    def allocate(size: int) -> torch.Tensor:
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        os.ftruncate(descriptor, size)
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)

    views = flat(bucket, allocate)
    handles = [
        TensorHandle(name, _dtype(view), tuple(view.shape), int(view.storage_offset()) * view.element_size())
        for name, view in views
    ]
    return Bucket(HOST, handles, views, descriptor)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def opened(handles: Sequence[TensorHandle], device: torch.device, descriptor: int | None) -> NamedTensors:
    """The tensors of another process's bucket. On a GPU they are its memory, for as long as it keeps the bucket.

    Raises:
        WeightsError: the memory is smaller than the handles say.
    """
    if descriptor is None:
        opens = [(handle.name, *handle.rebuilt_by(device.index or 0)) for handle in handles]
        return [(name, function(*arguments)) for name, function, arguments in opens]
    size = os.fstat(descriptor).st_size
    end = max((handle.offset + handle.nbytes for handle in handles), default=0)
    if end > size:
        raise WeightsError(f"a bucket of weights has {size} bytes, and its tensors need {end}")
    # A copy on write: nothing that is done with the tensors reaches the exporter.
    memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) if size else b""
    buffer = torch.frombuffer(memory, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    return [(h.name, buffer[h.offset : h.offset + h.nbytes].view(DTYPES[h.dtype]).view(h.shape)) for h in handles]


def digest(tensors: NamedTensors) -> str:
    """Proves their names, shapes and bits; see ``engines/collective/digest.py``."""
    from nemo_aapo.engines.collective.digest import Digest  # Megatron's, which servers of TensorRT-LLM lack
    from nemo_aapo.mcore.state import WeightPart

    sums = Digest()
    for name, tensor in tensors:
        shaped = tensor.reshape(tensor.shape or (1,))
        sums.add(WeightPart(f"{name} {tuple(tensor.shape)}", (0,) * shaped.dim(), shaped, True))
    return sums.of_this_rank()


def decode(found: Any) -> list[TensorHandle]:
    """The handles of ``Bucket.told``.

    Raises:
        WeightsError: it is something else.
    """
    if not isinstance(found, list):
        raise WeightsError("the trainer sent something else than handles of weights")
    return [_decoded(fields) for fields in found]


def _decoded(fields: Mapping[str, Any]) -> TensorHandle:
    try:
        handle = build(TensorHandle, dict(fields))
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"the trainer sent a handle that can't be read ({error})") from None
    if handle.dtype not in DTYPES or handle.offset < 0 or min(handle.shape, default=0) < 0:
        raise WeightsError(f"the trainer sent a handle of {handle.name} that no weight has")
    return handle
