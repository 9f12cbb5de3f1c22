"""Loggers that can't work are refused within a second, before anything is built."""

from __future__ import annotations

import socket
import threading

import pytest

from nemo_aapo.config import parse
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.prepare import loggers
from nemo_aapo.prepare.packages import loggers_need

WORDS = ["model.path=/m", "data.train=/t", "data.validation=/v"]


@pytest.fixture(scope="module")
def tree():
    return compose(read_command_line(WORDS))


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No keys, no proxies."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "NETRC", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def closed() -> str:
    """The URL of a port that nobody listens on, and that nobody else is given meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def config_with(tree, **settings):
    return parse({**tree, "exp_manager": {**tree["exp_manager"], "create_tensorboard_logger": False, **settings}})


def wandb(tree, **given):
    return config_with(tree, create_wandb_logger=True, wandb_logger_kwargs={"project": "p", **given})


def test_wandb_needs_a_key_and_a_connection_unless_it_is_offline(tree, closed, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"no key for https://api.wandb.ai.*`wandb login`.*offline=true"):
        loggers.check_loggers(wandb(tree), here=False)
    of_jobs = {**tree, "cluster": {**tree["cluster"], "env": {"WANDB_API_KEY": "k" * 40}}}  # as a site's conf/ may say
    with pytest.raises(ConfigError, match=r"no key for https://api.wandb.ai"):
        loggers.check_loggers(wandb(of_jobs), here=False)
    of_jobs["cluster"]["kind"] = "slurm"
    loggers.check_loggers(wandb(of_jobs), here=False)
    loggers.check_loggers(wandb(tree, offline=True), here=True)
    loggers.check_loggers(wandb(tree, mode="offline"), here=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers.check_loggers(wandb(tree), here=True)
    monkeypatch.delenv("WANDB_MODE")

    monkeypatch.setenv("WANDB_BASE_URL", closed)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {'k' * 40}\n")
    loggers.check_loggers(wandb(tree), here=False)  # Slurm may start it where there is a network
    with pytest.raises(ConfigError, match=rf"{closed} can't be reached \(Connection refused\); .*offline=true"):
        loggers.check_loggers(wandb(tree), here=True)
    monkeypatch.setenv("RANK", "1")
    loggers.check_loggers(wandb(tree), here=True)  # rank 0 alone logs


def test_mlflow_needs_a_connection_to_a_server_and_none_to_files(tree, closed, monkeypatch):
    loggers.check_loggers(config_with(tree, create_mlflow_logger=True), here=True)
    for given in ({"tracking_uri": closed}, {}):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", closed)
        with pytest.raises(ConfigError, match=rf"create_mlflow_logger=true: {closed} can't be reached"):
            loggers.check_loggers(config_with(tree, create_mlflow_logger=True, mlflow_logger_kwargs=given), here=True)


def test_a_server_a_dead_one_a_slow_name_and_a_proxy_are_told_apart_within_a_second(closed, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert loggers.connection_problem(alive) is None
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": alive})
        assert loggers.connection_problem("https://no.such.host.invalid") is None
    assert loggers.connection_problem(closed) == "Connection refused"
    monkeypatch.setattr("urllib.request.getproxies", dict)
    released, ended = threading.Event(), threading.Event()

    def look_up(*words, **more):
        released.wait(60)
        ended.set()
        return []

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    assert loggers.connection_problem("https://api.wandb.ai") == "no answer within 1 s"
    assert not ended.is_set()
    released.set()


def test_a_logger_needs_its_package_by_the_file_that_moves_no_pin(tree):
    needed = {package.distribution: package for package in loggers_need(wandb(tree))}
    assert list(needed) == ["nemo-toolkit", "lightning", "wandb"]
    assert needed["wandb"].remedy == "pip install --no-deps -r requirements/wandb.txt"
    mlflow = list(loggers_need(config_with(tree, create_mlflow_logger=True)))
    assert [package.distribution for package in mlflow] == ["lightning", "mlflow-skinny"]
    assert not list(loggers_need(config_with(tree)))
