"""A rollout server: one engine behind HTTP. ``python scripts/serve.py KEY=VALUE ...`` takes what ``train.py`` does.

It announces itself in ``rollout.server.directory`` and ends on SIGTERM, SIGINT or SIGHUP, or with the process that
started it; under ``nohup`` it outlives that one and its terminal.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.cli.main import command_of_ranks, run_command
from nemo_aapo.engines.remote.directory import ServerRecord, open_directory, open_token, publish, withdraw
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.prepare.server import ServerJob, prepare_server
from nemo_aapo.text.transformers5 import said
from nemo_aapo.utils.job import rank_of_job
from nemo_aapo.utils.safetensors import model_digest

if TYPE_CHECKING:
    from nemo_aapo.engines.build import HostedEngine
    from nemo_aapo.engines.deltas import VersionReader
    from nemo_aapo.engines.remote.worker import EngineWorker
    from nemo_aapo.engines.weights import Weights, WeightsId

STOP_S = 10.0
"""After a signal the running batch is broken off at its next finished completion, or left alone after this."""
PARENT_POLL_S = 1.0


def main(words: Sequence[str] | None = None) -> int:
    """Serve until told to stop; 0, or 1 or 2 with a message as scripts/train.py."""
    words = list(sys.argv[1:] if words is None else words)
    return run_command(
        prepare_server,
        functools.partial(serve, words=words, parent=os.getppid()),
        description="Host a rollout engine behind HTTP, for a trainer with rollout.engine=remote.",
        words=words,
    )


def serve(job: ServerJob, words: Sequence[str], parent: int) -> int:
    """Listen, load, answer, stop. Blocks. A server of several ranks starts them, unless it is one of them already.

    Args:
        words: that the job was made of.
        parent: id of the process that started this one.

    Raises:
        ConfigError: the port is in use, the directory or token is open to others, the model can't be loaded.
        LostRankError: one of its ranks is gone.
    """
    settings = job.config.rollout.server
    if local.starts_ranks(job.ranks):
        logs = Path(job.config.run.dir) / "logs" / f"server_{settings.index}"
        wait_s = job.config.trainer.fault_timeout_s
        return local.run_ranks(
            command_of_ranks("serve", words), job.ranks, logs, grace_s=STOP_S + wait_s, fault_timeout_s=wait_s
        )
    if rank_of_job():
        return _follow(job)
    directory = open_directory(settings.directory)
    token = open_token(directory)
    with _listening(settings.host, settings.port) as listener:
        return asyncio.run(_serve(job, directory, token, listener, parent))


def _follow(job: ServerJob) -> int:
    """Be one of the other ranks, which rank 0 tells when it is over."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from nemo_aapo.engines.build import build_hosted_engine
    from nemo_aapo.engines.ranks import follow

    follow(build_hosted_engine(job.config, job.shape))
    return 0


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(f"rollout.server.host={host}, rollout.server.port={port}: {error.strerror}") from None
    with listener:
        yield listener


async def _serve(job: ServerJob, directory: Path, token: str, listener: socket.socket, parent: int) -> int:
    from aiohttp import web

    from nemo_aapo.engines.remote.service import Service
    from nemo_aapo.engines.remote.wire import Limits

    stop, config = _stop_request(parent), job.config
    worker = _worker(job, directory)
    limits = Limits(job.shape.vocab_size, config.rollout.max_concurrent_tokens)
    service = Service(worker, token, limits, config.rollout.server.max_request_bytes)
    runner = service.runner()
    await runner.setup()
    await web.SockSite(runner, listener).start()
    settings = config.rollout.server
    index, address = settings.index, _address(listener, settings.host)
    layout = f"TP {settings.tensor_parallel_size} x PP {settings.pipeline_parallel_size}" if job.ranks > 1 else ""
    record = ServerRecord(
        index, address, os.getpid(), uuid.uuid4().hex, config.precision.name, ranks=job.ranks, layout=layout
    )
    publish(directory, record)
    _say(index, f"listens on {address}")
    if note := said(Path(config.model.path)):
        _say(index, f"{config.model.path}{note}")
    try:
        built = asyncio.wrap_future(worker.built)
        either: set[asyncio.Future[Any]] = {built, stop}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if built.done():
            built.result()
            _say(index, f"serves {worker.weights}")
        lost = asyncio.wrap_future(worker.lost)
        ends: set[asyncio.Future[Any]] = {stop, lost}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            raise lost.result()
        _say(index, f"stopping: {stop.result()}")
    finally:
        withdraw(directory, record)
        ended = await asyncio.to_thread(worker.stop, STOP_S if worker.built.done() else 0.0)
        await runner.cleanup()
    if not ended:  # its thread is deep in a forward pass or in an import: nothing of it is worth waiting for
        sys.stderr.flush()
        os._exit(0)
    return 0


def _worker(job: ServerJob, directory: Path) -> EngineWorker:
    from nemo_aapo.engines.remote.worker import EngineWorker
    from nemo_aapo.engines.weights import WeightsId  # with numpy, which refusals do without

    path = job.config.model.path

    @functools.cache
    def base() -> WeightsId:
        return WeightsId(0, model_digest(path))

    @functools.cache
    def reader() -> VersionReader:
        from nemo_aapo.engines.deltas import VersionReader

        name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
        mine = open_directory(Path(tempfile.gettempdir()) / f"nemo_aapo-{os.getuid()}")
        return VersionReader(directory, mine / f"server_{job.config.rollout.server.index}-{name}")

    def build() -> HostedEngine:
        from nemo_aapo.engines.build import build_hosted_engine

        hosted = build_hosted_engine(job.config, job.shape)
        if job.ranks == 1:
            return hosted
        from nemo_aapo.engines.ranks import led

        return led(hosted)

    @contextmanager
    def locate(weights: Weights, tensors: Set[str]) -> Iterator[Path]:
        from nemo_aapo.engines.remote.weight_store import require_architecture
        from nemo_aapo.errors import WeightsError
        from nemo_aapo.models.directory import read_config_json

        if weights.manifest is not None:
            with reader().whole(weights, tensors) as folder:
                require_architecture(read_config_json(folder), path)
                yield folder
        elif weights.id == base():
            yield Path(path)
        else:
            raise WeightsError(f"the base model of this server, {path}, is another one than the trainer's")

    return EngineWorker(build, base, locate)


def _stop_request(parent: int) -> asyncio.Future[str]:
    """Becomes what asked for the end: a signal, or that the process that started this one is gone.

    Who starts it with SIGHUP ignored, as ``nohup`` does, wants it to outlive its shell.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()
    detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def ask(reason: str) -> None:
        if not stop.done():
            stop.set_result(reason)

    def watch_parent() -> None:
        if os.getppid() != parent:
            ask("the process that started it is gone")
        loop.call_later(PARENT_POLL_S, watch_parent)

    for number in (signal.SIGTERM, signal.SIGINT, *(() if detached else (signal.SIGHUP,))):
        loop.add_signal_handler(number, ask, signal.Signals(number).name)
    if not detached:
        watch_parent()
    return stop


def _address(listener: socket.socket, host: str) -> str:
    port = listener.getsockname()[1]
    reachable = socket.getfqdn() if host in ("", "0.0.0.0", "::") else host
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _say(index: int, text: str) -> None:
    print(f"rollout server {index}: {text}", file=sys.stderr, flush=True)
