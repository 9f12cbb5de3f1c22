"""Imports all that a rank needs, for a server process that forks ranks. No thread and no process group is started."""

from __future__ import annotations

import torch

import tests.distributed.chaos  # noqa: F401
from nemo_aapo.libraries import quiet
from nemo_aapo.policy import cpu, weights

quiet()
torch.set_num_threads(1)
cpu.install()
weights._auto_bridge_class()
