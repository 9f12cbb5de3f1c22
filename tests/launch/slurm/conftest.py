"""One Slurm and one set of tiny inputs for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.slurm.cluster import Cluster, Run, make_run, missing
from tests.training_runs import make_input


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running Slurm of six nodes with eight make-believe GPUs each."""
    if reason := missing():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.manage("stop")


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Path:
    """A random model and ten prompts; the runs' directories come beside them."""
    return make_input(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def limited(cluster: Cluster, given) -> Run:
    """A run whose first two jobs reach their time limit. It is submitted early, as most of its time is waiting: the
    warning comes 90 to 120 s after the start (Slurm looks every 30 s, and warns 30 s early), when a step has begun."""
    run = make_run(cluster, given, "limited", 'cluster.time="00:10:00"', "cluster.signal_s=480", held=2)
    run.job = run.submit()[0]
    return run


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, given) -> Run:
    """The same settings and layout, started by hand on this machine."""
    run = make_run(cluster, given, "uninterrupted")
    words = [word for word in run.words if not word.startswith(("cluster", "+cluster"))]
    cluster.launch(*words, "cluster=local", "trainer.num_nodes=1", "trainer.devices=2", timeout=600)
    return run
