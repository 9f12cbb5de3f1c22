"""The TensorRT-LLM adapter's life over a real Ray; prints what it saw, as JSON.

python -m tests.peers.ray_run              one engine on two GPUs, from its start to its end
python -m tests.peers.ray_run owner        another on one GPU, which stays until it is killed
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps(
    {"CPU": 4}
)  # more than there are; GPUs come from CUDA_VISIBLE_DEVICES
os.environ["RAY_DEDUP_LOGS"] = "0"

from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.trtllm import placement
from nemo_aapo.engines.trtllm.engine import TrtllmEngine
from nemo_aapo.engines.trtllm.placement import Gpu
from nemo_aapo.errors import RunError
from tests import cuda_ipc, fake_trtllm
from tests.engines.trtllm.conftest import PROMPTS, SAMPLING, SEEDS, SETTINGS, tokens
from tests.fake_trtllm_executor import TABLE, table
from tests.peers import ray_trtllm

JOB = {"RANK": "3", "SLURM_PROCID": "3", "PMIX_RANK": "3", "MASTER_PORT": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def start(*numbers: int) -> TrtllmEngine:
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": 4, "GPU": len(numbers)})
    gpus = [Gpu("node", number, f"GPU-{number}", device) for device, number in enumerate(numbers)]
    settings = {**vars(SETTINGS), "tensor_parallel_size": len(gpus), "timeout_s": 400.0, "refit_bucket_bytes": 4000}
    return TrtllmEngine(type(SETTINGS)(**settings), placement.Alone(), gpus, colocated=True)


def life() -> dict[str, object]:
    """From start to end."""
    os.environ |= {**JOB, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}
    began = time.monotonic()
    engine = start(2, 3)
    found: dict[str, object] = {
        "start_s": time.monotonic() - began,
        "environment_back": os.environ.items() >= JOB.items(),
    }
    looks = engine._client.ask_workers("look")
    found["columns"] = [look["columns"] for look in looks]
    found["visible"] = [look["environment"]["CUDA_VISIBLE_DEVICES"] for look in looks]
    found["foreign"] = sorted({name for look in looks for name in JOB if name in look["environment"]})
    engine.wake()
    found["before"] = tokens(engine.generate(PROMPTS, SAMPLING, SEEDS))
    engine.sleep()
    try:
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    except RuntimeError as error:
        found["asleep"] = str(error)
    weights = [("other", table(5)), (TABLE, table(1))]
    engine.update_weights(weights, 1)
    found["left"] = cuda_ipc.left_behind()
    engine.wake()
    after = engine.generate(PROMPTS, SAMPLING, SEEDS)
    found["after"], found["versions"] = tokens(after), sorted({c.policy_version for row in after for c in row})
    found["buckets"] = sum(method == "update_weights" for method, _ in fake_trtllm.FAULTS.seen) - 1
    try:
        engine._client.release(["no such tag"])
    except RunError as error:
        found["error"] = str(error)
    engine.close()
    return found


def own() -> None:
    """Start, tell the workers' processes, and wait for the end."""
    engine = start(1)
    print(json.dumps([look["pid"] for look in engine._client.ask_workers("look")]), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    memory.share_on_gpu = cuda_ipc.share_on_gpu
    ray_trtllm.install()
    if sys.argv[1:] == ["owner"]:
        own()
    print(json.dumps(life()))
