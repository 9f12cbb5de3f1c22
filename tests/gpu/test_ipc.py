"""CUDA memory of this process in another one, as ``rollout.refit=ipc`` hands it over. Never run so far."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
READER = """
import json, sys
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.receiver import SharedBucket
tensors = SharedBucket(json.load(sys.stdin), None).tensors_on(*memory.own_device())  # refuses other bits
print(json.dumps([[name, list(tensor.shape), str(tensor.device)] for name, tensor in tensors]))
"""


def test_another_process_opens_the_handles_has_the_same_bits_and_lets_go():
    import torch

    from nemo_aapo.engines.ipc import memory

    device, name = memory.own_device()
    weights = [("w", torch.randn(300, 70, device=device)), ("b", torch.randn(7, device=device).bfloat16())]
    memory.give_back()
    before = torch.cuda.memory_reserved(device)
    bucket = memory.share(weights, device, name)
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(bucket.told()),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["w", [300, 70], str(device)], ["b", [7], str(device)]]
    bucket.close()
    memory.give_back()
    assert torch.cuda.memory_reserved(device) <= before
