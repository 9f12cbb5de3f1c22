"""Weights on their way to a TensorRT-LLM engine: one flat buffer of GPU memory a bucket, read by CUDA IPC.

Each worker of the engine opens the buffer that lies on its own GPU and takes its part of each tensor in it. Nothing
goes through host memory: the learner's export gathers on the GPU, and the copy into the buffer stays there. The handles
are pickled, as the library wants them; they go to processes of this very job and to nobody else.
"""

from __future__ import annotations

import base64
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from nemo_aapo.engines.trtllm.placement import Gpu

NamedTensors = list[tuple[str, torch.Tensor]]
ALIGNMENT = 256
"""Each tensor begins at a multiple of so many bytes, as CUDA's allocator and its copies like it."""


def payloads(bucket: NamedTensors, gpus: Sequence[Gpu]) -> tuple[dict[str, str], list[NamedTensors]]:
    """One bucket as ``AsyncLLM.update_weights`` takes it, for this process's GPUs.

    Returns:
        GPU UUID -> base64 of the pickled list of (Hugging Face name, handle), and what must stay alive until the
        engine has read it.
    """
    found, alive = {}, []
    for gpu in gpus:
        handles, views = export_to_ipc(bucket, gpu.device)
        found[gpu.uuid] = base64.b64encode(pickle.dumps(handles)).decode()
        alive.append(views)
    return found, alive


def flat(bucket: NamedTensors, device: torch.device) -> NamedTensors:
    """Copies of the tensors, end to end in one new buffer on a device.

    A handle names a whole allocation: a buffer of its own keeps the exporter's other tensors out of the reader's hands,
    and the reader maps one piece of memory a bucket instead of one a tensor.
    """
    ends = list(itertools.accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in bucket))
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, device=device)
    views = []
    for (name, tensor), begin in zip(bucket, [0, *ends], strict=False):
        view = buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append((name, view.copy_(tensor.detach())))
    return views


def export_to_ipc(bucket: NamedTensors, device: int) -> tuple[list[tuple[str, Any]], NamedTensors]:
    """Copy a bucket into a buffer on one GPU, and make handles by which another process can open its tensors.

    It is the one function of the refit that needs CUDA; the tests replace it.

    Returns:
        (name, (function, arguments) that opens it) of each, and the tensors in the buffer.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    views = flat(bucket, torch.device("cuda", device))
    torch.cuda.synchronize(device)  # the reader has another stream
    # One call a tensor: the reader counts down one counter of references for each that it opens.
    return [(name, reduce_tensor(view)) for name, view in views], views


def give_back_memory() -> None:
    """Let the driver have what the engine has read and what torch keeps unused, so that others can take it."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()  # buffers that were let go stay in torch's hands until the reader's counters are seen
        torch.cuda.empty_cache()
