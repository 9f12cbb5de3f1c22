"""Imports all that a rank needs, for a server process that forks ranks. No process group is started."""

from __future__ import annotations

import importlib

import torch

from nemo_aapo.libraries import quiet
from nemo_aapo.policy import bridge, cpu

quiet()
torch.set_num_threads(1)
cpu.install()
bridge.auto_bridge_class("Qwen2ForCausalLM")
for name in (
    "nemo_aapo.assemble",
    "nemo_aapo.policy.learner",
    "nemo_aapo.policy.megatron",
    "nemo_aapo.rollout.megatron_engine",
    "hydra",
    "tests.distributed.chaos",
):
    importlib.import_module(name)
