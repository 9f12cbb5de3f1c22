"""Runs one check in a process of its own, so that a hang, a crash or output of it costs no more than its own line.

No exception ends a hung collective, a hung file system or a library that aborts; killing a process does. The process is
forked, so that a check needs no start of Python. The forking process has not touched CUDA, which would not survive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import IO, NoReturn

from nemo_aapo.doctor.finding import Check, Context, Finding
from nemo_aapo.errors import ConfigError, DataError, RunError, one_line
from nemo_aapo.rewards.base import describe_error

LAST_WORDS = 300
"""Number of characters of a check's output that are shown when it dies."""
REAP_S = 5.0
"""Seconds in which a killed process is expected to end."""
_PR_SET_PDEATHSIG = 1


def run_guarded(check: Check, context: Context) -> list[Finding]:
    """The findings of the check; one failure if it exceeds its deadline, raises, or dies."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryFile() as output, ours, theirs:
        sys.stdout.flush()
        end = time.monotonic() + check.deadline_s
        pid = os.fork()
        if pid == 0:
            _child(check, context, theirs, output.fileno())
        theirs.close()
        late = False
        found: list[Finding] | None = None
        try:
            late = not ours.poll(end - time.monotonic())
            found = None if late else ours.recv()
        except EOFError:  # it died before it answered
            pass
        finally:
            code = _end(pid)
        return found or [_late(check, output) if late else _died(check, code, output)]


def _child(check: Check, context: Context, answer: Connection, output: int) -> NoReturn:
    """Run the check and send its findings. Ends the process, with whatever threads a library has left in it."""
    try:
        os.setsid()  # so that processes that it starts can be killed with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel ends it when the parent is gone
        faulthandler.disable()  # its tracebacks would push the last words out of the report
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        found = check.run(context)
        answer.send([found] if isinstance(found, Finding) else list(found))
    except (ConfigError, DataError, RunError) as error:  # these say what to do
        answer.send([Finding(check.name, "failure", one_line(error))])
    except BaseException as error:
        remedy = "a library or the check itself is at fault: see the place named"
        answer.send([Finding(check.name, "failure", f"broke off: {one_line(describe_error(error))}", remedy)])
    finally:
        os._exit(0)


def _late(check: Check, output: IO[bytes]) -> Finding:
    return Finding(
        check.name,
        "failure",
        f"not done after {check.deadline_s:g} s, and killed{_last_words(output)}",
        "something that it waits for hangs: another rank, the network, a file system, a GPU",
    )


def _died(check: Check, code: int | None, output: IO[bytes]) -> Finding:
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    remedy = "see its last words: out of memory, a library built for another machine, NCCL's watchdog"
    return Finding(check.name, "failure", f"died {how}{_last_words(output)}", remedy)


def _last_words(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - LAST_WORDS))
    words = one_line(output.read().decode(errors="replace"))
    return f"; its last words: {words}" if words else ""


def _end(pid: int) -> int | None:
    """Kill what is left of the process and of its children, and return its exit code, below 0 for a signal.

    None: it hangs in the kernel and can't be killed.
    """
    for kill in (os.killpg, os.kill):  # its group, if it has made one; until it is reaped its number can't be reused
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    end = time.monotonic() + REAP_S
    while time.monotonic() < end:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None
