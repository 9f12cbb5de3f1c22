"""Weights on their way to a TensorRT-LLM engine: one flat buffer of GPU memory a bucket, read by CUDA IPC.

Each worker of the engine opens the buffer that lies on its own GPU and takes its part of each tensor in it. Nothing
goes through host memory: the learner's export gathers on the GPU, and the copy into the buffer stays there. The library
wants the handles pickled; they are pickled here, from fields that are known, and go to the engine's own workers.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator, Sequence, Set

import torch

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.memory import NamedTensors, TensorHandle
from nemo_aapo.engines.ipc.receiver import SharedBucket
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.errors import WeightsError


def payloads(bucket: NamedTensors, gpus: Sequence[Gpu]) -> tuple[dict[str, str], list[memory.Bucket]]:
    """One bucket as ``AsyncLLM.update_weights`` takes it, for this process's GPUs.

    Returns:
        GPU UUID -> its payload, and what must stay alive until the engine has read it.
    """
    shared = [memory.share(bucket, torch.device("cuda", gpu.device), gpu.uuid) for gpu in gpus]
    return {part.device: payload(part.handles, gpu) for part, gpu in zip(shared, gpus, strict=True)}, shared


def payloads_of(
    buckets: Iterable[SharedBucket], names: Set[str], gpus: Sequence[Gpu]
) -> Iterator[tuple[dict[str, str], int]]:
    """The same of buckets in another process's memory, which the engine's workers open themselves, and their bytes.

    Args:
        names: of all tensors that must come.
        gpus: all of the engine's.

    Raises:
        WeightsError: one did not come, or lies elsewhere.
    """
    missing = set(names)
    for bucket in buckets:
        handles = {gpu: bucket.handles_on(gpu.uuid) for gpu in gpus}
        one_copy = handles[gpus[0]]
        missing -= {handle.name for handle in one_copy}
        found = {gpu.uuid: payload(handles[gpu], gpu) for gpu in gpus}
        yield found, sum(handle.nbytes for handle in one_copy)
    if missing:
        raise WeightsError(f"{len(missing)} tensors of the model did not come, {min(missing)} first")


def payload(handles: Sequence[TensorHandle], gpu: Gpu) -> str:
    """base64 of the pickled list of (Hugging Face name, (function, arguments) that opens it)."""
    return base64.b64encode(pickle.dumps([(handle.name, handle.rebuilt_by(gpu.device)) for handle in handles])).decode()
