"""Checks the file system of the run directory: what checkpoints need of it, its speed and its space."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.config import Config
from nemo_aapo.doctor.checks.sizes import bytes_per_parameter, count_parameters, on_this_machine, readable
from nemo_aapo.doctor.finding import Context, Finding
from nemo_aapo.planning import models
from nemo_aapo.planning.inputs import Layout
from nemo_aapo.planning.parameters import rank_parameters
from nemo_aapo.run.directory import check_run_directory
from nemo_aapo.run.names import CHECKPOINTS
from nemo_aapo.utils.files import bytes_of

SIZE = 64 * 2**20
"""Bytes that are written and read to measure the speed."""
SLOW_BYTES_PER_S = 50e6
"""A slower file system gets a warning: a checkpoint of a 7B model, 100 GB, would take more than half an hour."""
SLOW_SYNC_S = 1.0
"""A sync of a small file that takes longer gets a warning."""
SEEN_S = 30.0
"""A shared file system may take so long to show a new file on all machines."""


def file_system(context: Context) -> Finding:
    """Renames over an existing file, syncs, locks, writes and reads where the run directory is or will be."""
    name, config = "file_system", on_this_machine(context.run_config)
    check_run_directory(config)
    directory = nearest(Path(config.run.dir))
    try:
        with tempfile.TemporaryDirectory(prefix=".aapo_doctor_", dir=directory) as made:
            folder = Path(made)
            write, read = _speed(folder / "speed")
            renamed = _rename_is_atomic(folder)
            sync = _sync_seconds(folder)
            locks = _locks(folder / "lock")
    except OSError as error:
        remedy = "name another run.dir, or free space and rights there"
        return Finding(name, "failure", f"{directory} can't be written: {error.strerror or error}", remedy)
    speed = f"writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s, a sync takes {sync * 1e3:.0f} ms"
    if not renamed:
        remedy = "checkpoints need rename(2) as POSIX has it: name a run.dir on another file system"
        return Finding(name, "failure", f"{directory}: a rename over an existing file is not whole", remedy)
    if write < SLOW_BYTES_PER_S or read < SLOW_BYTES_PER_S or sync > SLOW_SYNC_S:
        remedy = "name a run.dir on a faster file system, or save less often (checkpoint.save_interval)"
        return Finding(name, "warning", f"{directory} is slow: {speed}", remedy)
    if not locks:
        remedy = "never start the same run twice at a time: nothing else would notice"
        return Finding(name, "warning", f"{directory} has no file locks; {speed}", remedy)
    return Finding(name, "ok", f"{directory}: atomic rename, locks; {speed}")


def nearest(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _speed(path: Path) -> tuple[float, float]:
    """Bytes per second of writing to the disk, and of reading back without the page cache."""
    block = os.urandom(2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(SIZE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write = SIZE / (time.perf_counter() - start)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        return write, SIZE / (time.perf_counter() - start)


def _rename_is_atomic(folder: Path) -> bool:
    """Whether a file that another one replaces has the new content at once, with the old name gone."""
    old, new = folder / "old", folder / "new"
    new.write_bytes(b"old")
    with new.open("rb") as reader:
        old.write_bytes(b"new")
        os.replace(old, new)
        return reader.read() == b"old" and new.read_bytes() == b"new" and not old.exists()


def _sync_seconds(folder: Path) -> float:
    """Seconds to sync a small file and its directory, as for a checkpoint's manifest."""
    start = time.perf_counter()
    with (folder / "small").open("wb") as file:
        file.write(b"small")
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - start


def _locks(path: Path) -> bool:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def shared_files(context: Context, wait_s: float = SEEN_S) -> Finding:
    """Have each rank make a file beside the run directory and look for those of all others."""
    name, place = "shared_files", context.place
    if place.world_size == 1:
        return Finding(name, "ok", "one rank, no files to share")
    folder = nearest(Path(context.run_config.run.dir)) / f".aapo_doctor_{context.token}"
    mine = folder / f"rank_{place.rank}"
    try:
        folder.mkdir(exist_ok=True)
        mine.touch()
        unseen = _unseen(folder, "rank", place.world_size, wait_s)
        (folder / f"done_{place.rank}").touch()
        _unseen(folder, "done", place.world_size, wait_s)  # no file is removed before all ranks have looked
    except OSError as error:
        return Finding(name, "failure", f"{folder.parent} can't be written: {error.strerror}", "name another run.dir")
    finally:
        if place.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if unseen:
        remedy = "put run.dir on a file system that all machines share"
        return Finding(name, "failure", f"in {folder.parent} no file of rank {', '.join(unseen)} is seen", remedy)
    return Finding(name, "ok", f"all {place.world_size} ranks see each other's files in {folder.parent}")


def _unseen(folder: Path, what: str, world_size: int, wait_s: float) -> list[str]:
    """Numbers of the ranks whose file ``WHAT_RANK`` is not seen in time."""
    wanted, end = set(range(world_size)), time.monotonic() + wait_s
    while wanted and time.monotonic() < end:
        try:
            names = os.listdir(folder)  # unlike a test of one path, it makes network file systems refresh their view
        except FileNotFoundError:  # another rank has seen all files and removed the folder
            return []
        wanted = {rank for rank in wanted if f"{what}_{rank}" not in names}
        time.sleep(0.05 if wanted else 0)
    return [str(rank) for rank in sorted(wanted)]


def disk(context: Context) -> Finding:
    """Compare the free space with what checkpoints, kept and being written, and the export need beside those there."""
    config = on_this_machine(context.run_config)
    directory = nearest(Path(config.run.dir))
    free = shutil.disk_usage(directory).free
    need, text = disk_need(config)
    if free < need:
        remedy = "free space, name another run.dir, or keep fewer (checkpoint.keep_last)"
        return Finding("disk", "failure", f"{directory} has {readable(free)} free, the run needs {text}", remedy)
    return Finding("disk", "ok", f"{readable(free)} free, the run needs {text}")


def disk_need(config: Config) -> tuple[int, str]:
    """Bytes that the run needs beside its checkpoints that are there, and an explanation.

    Args:
        config: without values that are left to the machine.
    """
    parameters = count_parameters(Path(config.model.path))
    size = bytes_per_parameter(config)
    keep = config.checkpoint
    checkpoints = keep.keep_last + 1 + (keep.keep_best is not None)
    lora = config.model.lora
    adapters = 0  # of a family that is not planned; they are a hundredth of the rest
    if lora and models.is_planned(config.model.path):
        adapters = rank_parameters(models.read(config.model.path), Layout(), 0, lora).adapters
    one = (parameters + adapters) * size.weight + (adapters if lora else parameters) * size.optimizer
    export = parameters * size.weight if config.export_hf_model else 0
    made = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep.keep_last, keep.keep_best).steps()
    there = sum(min(bytes_of(path), one) for path in made[-checkpoints:])  # older ones are replaced by newer
    need = checkpoints * one + export - there
    parts = f"{checkpoints} checkpoints of {readable(one)}, export {readable(export)}"
    return need, f"{readable(need)} ({parts}{f', {readable(there)} are there already' if there else ''})"
