"""Checkpoints that are whole or not there: save, resume on any layout, verify, fall back.

    <run.dir>/checkpoints/step_000050/           complete: it got this name after everything was on the disk
        __0_0.distcp ...  .metadata  common.pt  metadata.json     mcore's torch_dist files (see torch_dist.py)
        manifest.json                                             trainer state, checksums (see manifest.py)
    <run.dir>/checkpoints/.step_000050.partial/  a save that was interrupted; removed at the next start or save
    <run.dir>/checkpoints/step_000050.damaged/   what ``latest_good`` went back from; never removed, for people to judge

When to save is the trainer's business. Saving is synchronous.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import nemo_aapo
from nemo_aapo import manifest, parallel, torch_dist
from nemo_aapo.manifest import CheckpointError, DamagedCheckpointError, Manifest

T = TypeVar("T")
logger = logging.getLogger(__name__)

ResumeMode = Literal["auto", "latest_good"]


class Checkpointable(Protocol):
    """What is needed of the policy; ``MegatronPolicy`` has it."""

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves to and resumes from one directory. Methods are collective unless they say otherwise.

    Every error is raised on all ranks alike, so that none waits for another; the process group's deadline guards the
    rest.
    """

    def __init__(self, directory: Path | str, config_digest: str, keep_last: int, keep_best: str | None = None) -> None:
        """Touches no file.

        Args:
            directory: holds the checkpoints; made at the first save. All ranks see the same one.
            config_digest: of this run (``config.digest``); checkpoints of another are refused.
            keep_last: how many checkpoints stay, at least one.
            keep_best: the checkpoint with the highest value of this stays too: a key of ``trainer_state["metrics"]``.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least one checkpoint has to stay")
        self.directory = Path(directory)
        self.config_digest = config_digest
        self.keep_last = keep_last
        self.keep_best = keep_best

    # ------------------------------------------------------------------ saving

    def save(self, step: int, policy: Checkpointable, trainer_state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove those older than the newest ``keep_last``.

        Args:
            step: training steps done, at least 1: before that the optimizer has no state to save.
            trainer_state: what JSON can hold unchanged; rank 0's is kept.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: on all ranks, for a failure on any (a full disk); earlier checkpoints are as they were.
        """
        if step < 1:
            raise ValueError(f"step {step}: nothing to save before the first optimizer step")
        target = self.directory / f"step_{step:06d}"
        partial = self.directory / f".{target.name}.partial"
        try:
            _on_first_rank(lambda: self._begin(target, partial))
            torch_dist.write(policy.sharded_state_dict(), partial, parallel_state.get_data_parallel_group_gloo())
            sealed = _on_all_ranks(lambda: _seal_own_files(partial))
            files = {name: record for part in sealed for name, record in part.items()}
            content = Manifest(step, self.config_digest, trainer_state, _layout(), _versions(), files)
            _on_first_rank(lambda: self._commit(content, partial, target))
        except CheckpointError as error:
            if parallel.rank() == 0:
                _remove(partial)
            raise CheckpointError(
                f"the checkpoint of step {step} was not saved in {self.directory} ({_free_space(self.directory)}); "
                f"earlier ones are as they were: {error}"
            ) from error
        _on_first_rank(lambda: self._prune(step))
        return target

    def _begin(self, target: Path, partial: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if target.exists():
            raise CheckpointError(f"{target} exists already, and is not overwritten")
        partial.mkdir()

    def _commit(self, content: Manifest, partial: Path, target: Path) -> None:
        manifest.write(content, partial)
        manifest.sync_directory(partial)
        os.rename(partial, target)
        manifest.sync_directory(self.directory)

    def _prune(self, step: int) -> None:
        """Remove what is older than the newest ``keep_last``; what just was saved is one of these."""
        steps = self._steps()
        older = [path for path in steps if _step_of(path) < step]
        best = self._best(steps)
        for path in older[: max(0, len(older) - self.keep_last + 1)]:
            if path != best:
                _remove(path)

    def _best(self, paths: list[Path]) -> Path | None:
        """The checkpoint with the highest value of ``keep_best``, the newest of equals; None where none has one."""
        if self.keep_best is None:
            return None
        values = [(manifest.read(path).trainer_state.get("metrics", {}).get(self.keep_best), path) for path in paths]
        known = [(value, _step_of(path), path) for value, path in values if value is not None]
        return max(known)[2] if known else None

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob(".step_*"):
            if path.suffix in (".partial", ".removing"):
                logger.warning("removing what an interrupted run left: %s", path)
                _remove(path)

    # ------------------------------------------------------------------ loading

    def latest(self) -> Path | None:
        """The newest checkpoint, unverified; None without any. Not collective."""
        steps = self._steps()
        return steps[-1] if steps else None

    def load(self, path: Path | str, policy: Checkpointable) -> dict[str, Any]:
        """Verify a checkpoint, and load it into the policy under the present layout.

        Returns:
            The trainer state, equal to what was saved.

        Raises:
            DamagedCheckpointError: a file is missing, truncated or altered; the policy is untouched.
            CheckpointError: it belongs to another configuration, or holds a pickle that may run code.
        """
        path = Path(path)
        content = self._verify(path)
        header = _on_first_rank(lambda: torch_dist.read_header(path))
        policy.load_state_dict(torch_dist.read(policy.sharded_state_dict(is_loading=True), path, header))
        return content.trainer_state

    def resume(self, policy: Checkpointable, mode: ResumeMode = "auto") -> dict[str, Any] | None:
        """Load the newest checkpoint.

        Args:
            mode: what to do if it is damaged. ``auto``: stop. ``latest_good``: go back to the newest that is whole;
                the damaged ones are renamed to ``step_N.damaged``, or they would be in the way.

        Returns:
            The trainer state; None if the directory holds no checkpoint, so that a run may start afresh.

        Raises:
            CheckpointError: on all ranks. With anything there that looks like a checkpoint, None is never returned.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(_on_first_rank(self._checkpoints_at_start)):
            try:
                state = self.load(path, policy)
            except DamagedCheckpointError as error:
                if mode == "auto":
                    raise DamagedCheckpointError(
                        f"can't resume from {path}: {error}. checkpoint.resume=latest_good goes back to the newest "
                        "checkpoint that is whole"
                    ) from error
                damaged[path] = str(error)
                continue
            _on_first_rank(functools.partial(self._set_aside, damaged, path))
            return state
        if damaged:
            reasons = "; ".join(damaged.values())
            raise CheckpointError(f"no checkpoint in {self.directory} is whole: {reasons}")
        return None

    def _checkpoints_at_start(self) -> list[Path]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):  # that nothing can be saved shows now, not hours later
            self._remove_leftovers()
        steps = self._steps()
        strange = [path.name for path in self.directory.glob("step_*")]
        if strange and not steps:
            raise CheckpointError(
                f"{self.directory} holds {', '.join(sorted(strange))} but no step_NNNNNN to resume from: "
                "move them away to start afresh"
            )
        return steps

    def _verify(self, path: Path) -> Manifest:
        """Check whose the checkpoint is and then every file; the ranks share the reading."""
        content = _on_first_rank(lambda: manifest.read(path))
        if content.config_digest != self.config_digest:
            raise CheckpointError(
                f"{path} belongs to another configuration: its digest is {content.config_digest}, this run's "
                f"{self.config_digest}. Resume with the settings it was saved under, or use another run.dir"
            )
        if _step_of(path) not in (None, content.step):
            raise DamagedCheckpointError(f"{path} was renamed: its manifest says step {content.step}")
        own = manifest.share(content.files, parallel.rank(), dist.get_world_size())
        checked = _on_all_ranks(lambda: [manifest.problem(path, name, content.files[name]) for name in own])
        problems = [problem for part in checked for problem in part if problem]
        if problems:
            raise DamagedCheckpointError("; ".join(problems))
        return content

    def _set_aside(self, damaged: dict[Path, str], loaded: Path) -> None:
        for path, reason in damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            _remove(aside)
            os.rename(path, aside)
            logger.warning("went back to %s, since %s; what there is of %s is now %s", loaded, reason, path, aside)

    def _steps(self) -> list[Path]:
        """Checkpoints by step, oldest first."""
        found = [path for path in self.directory.glob("step_*") if _step_of(path) is not None]
        return sorted(found, key=_step_of)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step_(\d{6,})", path.name)
    return int(match.group(1)) if match else None


def _seal_own_files(directory: Path) -> dict[str, manifest.FileRecord]:
    """Bring the files to the disk that this rank wrote, and record them."""
    own = manifest.share(os.listdir(directory), parallel.rank(), dist.get_world_size())
    return {name: manifest.seal(directory / name) for name in own}


def _layout() -> dict[str, int]:
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_parallel_size": parallel.data_parallel_size(),
    }


def _versions() -> dict[str, str]:
    return {
        "nemo_aapo": nemo_aapo.__version__,
        "megatron_core": megatron.core.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _remove(path: Path) -> None:
    """Remove a directory. That it can't be is no reason to end a run: it is tried again at the next save."""
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.removing")
    try:
        if path.exists():
            os.rename(path, doomed)  # half removed, it must not look like a checkpoint
            shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("can't remove %s: %s", path, error)


def _free_space(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:,.0f} MiB free"
    except OSError as error:
        return f"free space unknown: {error}"


def _on_first_rank(action: Callable[[], T]) -> T:
    """Rank 0 acts; all ranks get its result, or raise its error."""
    outcome = parallel.broadcast_from_first_rank(_outcome(action) if parallel.rank() == 0 else None)
    if isinstance(outcome, CheckpointError):
        raise outcome
    return outcome


def _on_all_ranks(action: Callable[[], T]) -> list[T]:
    """All ranks act; each gets all results in rank order, or raises the first error."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _outcome(action))
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, CheckpointError):
            raise CheckpointError(f"rank {rank}: {outcome}") from outcome
    return outcomes


def _outcome(action: Callable[[], T]) -> T | CheckpointError:
    """What ``action`` returns, or the error it ends in, for all ranks to raise: alone, it would leave them waiting."""
    try:
        return action()
    except CheckpointError as error:
        return error
    except Exception as error:
        failure = CheckpointError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
