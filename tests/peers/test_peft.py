"""A LoRA run's adapters, exported alone, in the library ``peft``: the same model as merged in ours."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import torch
import yaml

from tests.checkpoint_runs import make_checkpointer, train
from tests.mcore.test_lora import make_policy
from tests.peers.peers import needs, run_peer

pytestmark = needs("peft")


def _train_and_export(model, run, tp, pp):
    from nemo_aapo.conversion.convert import checkpoint_to_hf
    from nemo_aapo.conversion.source import find_source
    from nemo_aapo.distributed import parallel

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
    run_peer("peft_run", base, tmp_path / "adapter", output, home=tmp_path)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        merged, plain = (
            AutoModelForCausalLM.from_pretrained(p)(ids).logits[0].numpy() for p in (tmp_path / "merged", base)
        )
    np.testing.assert_allclose(np.load(output), merged, atol=1e-4)
    assert np.abs(merged - plain).max() > 0.01
