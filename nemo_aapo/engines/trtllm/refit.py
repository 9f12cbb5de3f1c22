"""Weights on their way to a TensorRT-LLM engine: in buckets, by CUDA IPC.

Each worker of the engine opens the handle of the copy that lies on its own GPU and takes its part of the tensor. The
handles are pickled, as the library wants them; they go to processes of this very job and to nobody else.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from nemo_aapo.engines.trtllm.placement import Gpu

NamedTensors = list[tuple[str, torch.Tensor]]


def payloads(bucket: NamedTensors, gpus: Sequence[Gpu]) -> tuple[dict[str, str], list[NamedTensors]]:
    """One bucket as ``AsyncLLM.update_weights`` takes it, for this process's GPUs.

    Returns:
        GPU UUID -> base64 of the pickled list of (Hugging Face name, handle), and what must stay alive until the
        engine has read it.
    """
    found, alive = {}, []
    for gpu in gpus:
        handles, tensors = export_to_ipc(bucket, gpu.device)
        found[gpu.uuid] = base64.b64encode(pickle.dumps(handles)).decode()
        alive.append(tensors)
    return found, alive


def export_to_ipc(bucket: NamedTensors, device: int) -> tuple[list[tuple[str, Any]], NamedTensors]:
    """Copy the tensors to one GPU, and make handles by which another process can open the copies.

    It is the one function of the adapter that needs CUDA; the tests replace it.

    Returns:
        (name, (function, arguments) that opens it) of each, and the copies.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.ipc_collect()  # earlier buckets, which the engine has let go
    # A copy of its own each: a handle names a whole allocation, which the exporter would use again.
    copies = [(name, tensor.detach().to(torch.device("cuda", device), copy=True)) for name, tensor in bucket]
    torch.cuda.synchronize(device)  # the reader has another stream
    return [(name, reduce_tensor(tensor)) for name, tensor in copies], copies
