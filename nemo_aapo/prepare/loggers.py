"""Weights & Biases and MLflow before a run begins: key and network, within a second. Imports neither of them."""

from __future__ import annotations

import netrc
import os
import socket
import threading
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from nemo_aapo.config import Config
from nemo_aapo.errors import ConfigError

CONNECT_S = 1.0
"""A tracking server, or the proxy before it, is given so long to accept a connection."""
WANDB = "https://api.wandb.ai"
_OFFLINE = ("offline", "dryrun", "disabled")
_PORTS = {"http": 80, "https": 443}


def check_loggers(config: Config, *, here: bool) -> None:
    """Refuse loggers that would fail, or wait for minutes, once the model is built.

    Args:
        here: the ranks run on this machine; rank 0, which alone logs, then tries whether the servers can be reached.

    Raises:
        ConfigError: a key or a connection is missing, and how to do without.
    """
    given = config.cluster.env if config.cluster.kind != "local" else {}
    environment = {**{name: str(value) for name, value in given.items()}, **os.environ}
    here = here and environment.get("RANK", "0") == "0"
    if config.exp_manager.create_wandb_logger:
        _check_wandb(config.exp_manager.wandb_logger_kwargs, environment, here)
    if config.exp_manager.create_mlflow_logger:
        url = config.exp_manager.mlflow_logger_kwargs.get("tracking_uri") or environment.get("MLFLOW_TRACKING_URI")
        if here and urlsplit(url or "").scheme in _PORTS:
            _require_connection(str(url), "mlflow", "without MLFLOW_TRACKING_URI and tracking_uri it writes to run.dir")


def _check_wandb(given: Mapping[str, object], environment: Mapping[str, str], here: bool) -> None:
    if given.get("offline") or (given.get("mode") or environment.get("WANDB_MODE")) in _OFFLINE:
        return
    remedy = "+exp_manager.wandb_logger_kwargs.offline=true writes to run.dir/wandb, for `wandb sync` later"
    url = environment.get("WANDB_BASE_URL", WANDB)
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if not any(environment.get(name) for name in keys) and not _in_netrc(urlsplit(url).hostname or ""):
        raise ConfigError(
            f"exp_manager.create_wandb_logger=true: there is no key for {url}. Set WANDB_API_KEY or call "
            f"`wandb login`; {remedy}"
        )
    if here:
        _require_connection(url, "wandb", remedy)


def _in_netrc(host: str) -> bool:
    """Whether ``wandb login`` has left a key for the host."""
    named = os.environ.get("NETRC")
    for path in [named] if named else [os.path.expanduser(f"~/{name}") for name in (".netrc", "_netrc")]:
        try:
            if netrc.netrc(path).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _require_connection(url: str, logger: str, remedy: str) -> None:
    if problem := connection_problem(url):
        raise ConfigError(f"exp_manager.create_{logger}_logger=true: {url} can't be reached ({problem}); {remedy}")


def connection_problem(url: str) -> str | None:
    """Why no connection to a server, or to the proxy that leads to it, is made within a second; None: it is made."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    found = [f"no answer within {CONNECT_S:g} s"]

    def connect() -> None:
        try:
            port = parts.port or _PORTS.get(parts.scheme, 80)
            with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S):
                found[0] = ""
        except (OSError, ValueError) as error:  # ValueError: no port, or no host name
            found[0] = getattr(error, "strerror", None) or str(error)

    attempt = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    attempt.start()
    attempt.join(CONNECT_S)
    return found[0] or None
