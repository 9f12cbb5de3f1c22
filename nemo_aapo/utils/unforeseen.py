"""The one place that turns an error which nobody foresaw into a message: what, where, and where its traceback is."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from nemo_aapo.errors import ConfigError, first_line

PACKAGE = Path(__file__).resolve().parents[1]
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def forgive_console() -> None:
    r"""Have letters that the console's encoding lacks written as ``\u221a`` instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def paths_refused() -> Iterator[None]:
    """Inside, a path that can't be looked at (a name too long, no permission) is refused as a setting is."""
    try:
        yield
    except OSError as error:
        raise ConfigError(in_words(error)) from error


def describe(error: Exception, run_dir: Path | None, rank: int = 0) -> str:
    """The message for people; the traceback goes to a log, which the message names.

    What the machine refuses (a full disk, no memory, too many open files) is said in its words and need not be
    reported.

    Args:
        run_dir: of the run, if there is one: where the log is kept. Else it lies among the temporary files.
    """
    log = keep_traceback(error, run_dir, rank)
    if isinstance(error, OSError) and error.strerror:
        return f"{in_words(error)} ({_place(error)}; the traceback is {log})"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return (
            f"out of memory ({_place(error)}; the traceback is {log}). Lower max_tokens_per_microbatch or "
            "rollout.max_concurrent_tokens, or use more ranks; scripts/plan.py says what a run takes"
        )
    return (
        f"an error that nobody foresaw, {_place(error)}: {type(error).__name__}: {first_line(error)}\n"
        f"Please report this with the command and its traceback, which is {log}"
    )


def in_words(error: OSError) -> str:
    """What the machine refused, with the file that it is about."""
    hint = ". Raise the limit first: ulimit -n 65536" if "open files" in str(error.strerror) else ""
    return f"{error.filename}: {error.strerror}{hint}" if error.filename else f"{error.strerror}{hint}"


def keep_traceback(error: Exception, run_dir: Path | None, rank: int) -> str:
    """Where the traceback is from now on: ``logs/error_rank_0.log``; if no file can be written, it is on stderr."""
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    text = "".join(traceback.format_exception(error))
    try:
        folder = run_dir / "logs" if run_dir is not None and run_dir.is_dir() else Path(tempfile.gettempdir())
        folder.mkdir(exist_ok=True)
        name = f"error_rank_{rank}.log" if folder.name == "logs" else f"nemo_aapo_error_{now.replace(' ', '_')}.log"
        with (folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"==== {now} rank {rank}: {shlex.join(sys.argv)}\n{text}")
        return f"in {folder / name}"
    except OSError:
        print(text, file=sys.stderr, flush=True)
        return "above"


def _place(error: Exception) -> str:
    """The innermost line of this package that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    for frame in reversed(own or frames):
        path = Path(frame.filename)
        return f"at {path.relative_to(PACKAGE.parent) if own else path}:{frame.lineno}, in {frame.name}"
    return "at an unknown place"
