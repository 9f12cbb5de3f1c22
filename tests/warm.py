"""Imports all that a rank needs, for a server process that forks ranks. No process group is started."""

from __future__ import annotations

import importlib

import torch

from nemo_aapo.mcore.bridge import loader
from nemo_aapo.mcore.cpu import patches as cpu
from nemo_aapo.utils.libraries import quiet

quiet()
torch.set_num_threads(1)
cpu.install()
loader.auto_bridge_class("Qwen2ForCausalLM")
for name in (
    "nemo_aapo.jobs.train",
    "nemo_aapo.learner.learner",
    "nemo_aapo.learner.policy",
    "nemo_aapo.engines.megatron.engine",
    "hydra",
    "tests.chaos",
):
    importlib.import_module(name)
