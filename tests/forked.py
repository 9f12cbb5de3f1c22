"""Processes forked from one server process that has imported what a rank needs: imports cost more than most tests."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def forking() -> multiprocessing.context.ForkServerContext:
    """A context whose processes have the modules of ``tests/warm.py``, and the environment of the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        multiprocessing.forkserver.ensure_running()
    return context
