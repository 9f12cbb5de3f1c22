"""A LoRA run's adapters, exported alone, in the library ``peft``: the same model as merged in ours."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.distributed.checkpoint_runs import make_checkpointer, train
from tests.distributed.test_lora import make_policy

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
VERSION = re.search(r"^peft==(.+)$", (ROOT / "requirements" / "peers.txt").read_text(), re.MULTILINE)[1]

pytestmark = pytest.mark.skipif(
    not (PEERS / f"peft-{VERSION}.dist-info").is_dir(),
    reason=f".venv-peers has no peft {VERSION}: run scripts/peers.sh, which says what is in the way",
)


def _train_and_export(model, run, tp, pp):
    from nemo_aapo import parallel
    from nemo_aapo.conversion.convert import checkpoint_to_hf
    from nemo_aapo.conversion.source import find_source

    policy = make_policy(model, tp, pp)
    for step in (1, 2):
        train(policy, step)
    make_checkpointer(run / "checkpoints").save(2, policy, {})
    if parallel.rank() == 0:
        tree = json.loads(json.dumps(dataclasses.asdict(policy.config)))
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    parallel.barrier()
    checkpoint_to_hf(find_source(run), run / "adapter", adapter=True)
    checkpoint_to_hf(find_source(run), run / "merged")


def test_peft_computes_with_the_exported_adapters_what_the_merged_model_computes(ranks, tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    ranks.run(_train_and_export, tiny_models["qwen3"], tmp_path, 2, 2, world=4, tp=2, pp=2)
    base, output = tiny_models["qwen3"], tmp_path / "logits.npy"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.peers.peft_run", base, tmp_path / "adapter", output],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(PEERS), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        merged, plain = (
            AutoModelForCausalLM.from_pretrained(p)(ids).logits[0].numpy() for p in (tmp_path / "merged", base)
        )
    np.testing.assert_allclose(np.load(output), merged, atol=1e-4)
    assert np.abs(merged - plain).max() > 0.01
