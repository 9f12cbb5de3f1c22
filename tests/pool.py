"""Worker ranks that stay alive over the whole test session, so that each test pays for groups only, not for imports.

``ranks.run(function, *args, world=4, tp=2, pp=2)`` calls a module-level function on each of ``world`` processes, with
torch.distributed (gloo) and Megatron's groups initialised, and returns the list of their results. With ``tp=None``
Megatron's groups are left to the function.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from tests.forked import forking

MAX_RANKS = 4


MOST_THREADS = 250
"""Threads of a worker at which the pool starts afresh: groups that a test has kept alive keep theirs, and hundreds of
them slow every later test."""

NOT_MET = "connectFullMesh failed"
"""gloo's words where ranks that connect to one another lose a connection, before any code of ours runs: seen now and
then on a busy machine."""


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """Up to four processes, started when the first test needs them."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []
        self._context = forking()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int = 1,
        tp: int | None = 1,
        pp: int = 1,
        ep: int = 1,
        cp: int = 1,
        seed: int = 1,
        timeout_s: float = 120.0,
    ) -> list[Any]:
        """Results of ``function(*args)`` by rank.

        Raises:
            RankError: a rank raised or did not answer in time; in the latter case the pool starts afresh.
        """
        job = (tp, pp, ep, cp, seed)
        answers = self._answers(function, args, world, job, timeout_s)
        if any(NOT_MET in text for ok, text in answers.values() if not ok):
            warnings.warn("the ranks could not connect to one another: the pool starts afresh", stacklevel=2)
            self.close()
            answers = self._answers(function, args, world, job, timeout_s)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if len(answers) < world or any("died with exit code" in text for text in failures) or self._is_crowded():
            self.close()
        if failures or len(answers) < world:
            missing = sorted(set(range(world)) - set(answers))
            raise RankError("\n".join(failures) + (f"\nno answer from ranks {missing}" if missing else ""))
        return [answers[rank][1] for rank in range(world)]

    def _answers(
        self, function: Callable[..., Any], args: tuple[Any, ...], world: int, job: tuple[Any, ...], timeout_s: float
    ) -> dict[int, tuple[bool, Any]]:
        """By rank: whether it went well, and the result or a traceback. job: from ``tp`` to ``seed`` of ``run``."""
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((function, args, rank, world, *job, store, timeout_s))
            return self._collect(world, timeout_s)

    def _is_crowded(self) -> bool:
        return any(len(os.listdir(f"/proc/{process.pid}/task")) > MOST_THREADS for process, _ in self._workers)

    def _start(self, world: int) -> None:
        if dead := [process.exitcode for process, _ in self._workers if not process.is_alive()]:
            warnings.warn(f"ranks died between two tests, with exit codes {dead}: the pool starts afresh", stacklevel=3)
            self.close()
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world])}
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout_s + 60.0  # what the workers are forked from has to import first
        while pending and time.monotonic() < end:
            for pipe in multiprocessing.connection.wait(list(pending), timeout=1.0):
                rank = pending.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, f"died with exit code {self._workers[rank][0].exitcode}")
                if not answers[rank][0]:  # the others may wait for it for ever
                    end = min(end, time.monotonic() + 20.0)
        return answers

    def close(self) -> None:
        """Kill the workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join(10)
            pipe.close()
        self._workers = []


def _serve(pipe: Any) -> None:
    warnings.simplefilter("ignore")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _call(*job)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _call(function, args, rank, world, tp, pp, ep, cp, seed, store, timeout_s):
    import datetime
    import gc

    import torch.distributed as dist

    from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    dist.barrier()  # or those that have met would begin while others start afresh
    try:
        if tp is not None:
            initialize_model_parallel(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                expert_model_parallel_size=ep,
                context_parallel_size=cp,
                seed=seed,
                timeout_s=timeout_s,
            )
        return function(*args)
    finally:
        destroy_model_parallel()
        gc.collect()  # groups that are still referred to keep their threads
