"""The loop on one rank, with fakes for its parts."""

from __future__ import annotations

import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.distributed import parallel
from tests.training.fakes import (
    STEPS,
)


@pytest.fixture(scope="module")
def config():
    """Five steps, a validation and a checkpoint every two."""
    words = ["model.path=/m", "data.train=/t", "data.validation=/v", "algorithm=gpg", "run.dir=/run"]
    words += ["prompts_per_step=2", "group_size=2", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=2"]
    return load_config([*words, "checkpoint.save_interval=2"])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """The loop's collectives among one rank, without a process group."""
    monkeypatch.setattr(parallel, "any_rank", lambda *flags: list(flags))
    monkeypatch.setattr(parallel, "gather_data_parallel", lambda value: [value])
    monkeypatch.setattr(parallel, "is_model_parallel_source", lambda: True)
    monkeypatch.setattr(parallel, "data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
