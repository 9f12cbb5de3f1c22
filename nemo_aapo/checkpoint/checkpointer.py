"""Checkpoints that are whole or not there: save, resume on any layout, verify, fall back.

    <run.dir>/checkpoints/step_000050/           complete: it got this name after everything was on the disk
        __0_0.distcp ...  .metadata  common.pt  metadata.json     mcore's torch_dist files (see format.py)
        manifest.json                                             trainer state, checksums (see manifest.py)
    <run.dir>/checkpoints/.step_000050.partial/  a save that was interrupted; removed at the next start or save
    <run.dir>/checkpoints/step_000050.damaged/   what ``latest_good`` went back from; never removed, for people to judge
                                                              (one that is damaged again: .damaged.2)

When to save is the trainer's business. In the background, ``save`` returns as soon as there is a copy of the state in
the host's memory; a thread writes it while training goes on. Its collectives run in a process group of their own.
"""

from __future__ import annotations

import datetime
import functools
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import megatron.core
import torch
import torch.distributed as dist

import nemo_aapo
from nemo_aapo.checkpoint import format as torch_dist
from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.directory import CheckpointDirectory
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import Group, on_all_ranks, on_first_rank
from nemo_aapo.errors import CheckpointError, DamagedCheckpointError
from nemo_aapo.run.names import step_of
from nemo_aapo.utils.background import Background
from nemo_aapo.utils.files import free_space, remove_directory

ResumeMode = Literal["auto", "latest_good"]


class Checkpointable(Protocol):
    """What is needed of the policy; ``MegatronPolicy`` has it."""

    def sharded_state_dict(self, is_loading: bool = False) -> torch_dist.ShardedStateDict:
        """This rank's shards of model and optimizer, as mcore's distributed checkpoints take them."""
        ...

    def load_state_dict(self, state: torch_dist.StateDict) -> None:
        """Take over what a checkpoint held."""
        ...


class Checkpointer:
    """Saves to and resumes from one directory. Methods are collective unless they say otherwise.

    Every error is raised on all ranks alike, so that none waits for another; the process group's deadline guards the
    rest.
    """

    def __init__(
        self,
        directory: Path | str,
        config_digests: Sequence[str],
        keep_last: int,
        keep_best: str | None = None,
        *,
        background: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        """Touch no file.

        Args:
            directory: holds the checkpoints; made at the first save. All ranks see the same one.
            config_digests: of this run (``config.digests_of_run``): the first is written into its checkpoints, and
                those with none of them are refused.
            keep_last: how many checkpoints stay, at least one.
            keep_best: the checkpoint with the highest value of this stays too: a key of ``trainer_state["metrics"]``.
            background: write while training goes on; costs a copy of this rank's shard of the state.
            timeout_s: how long a rank waits in the background for another one.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least one checkpoint has to stay")
        self.directory = CheckpointDirectory(directory, keep_last, keep_best)
        self.config_digests = tuple(config_digests)
        self.seconds = 0.0
        """Wall-clock seconds of the last finished save, from its beginning to its name."""
        self.resumed_from: Path | None = None
        """The checkpoint that ``resume`` loaded."""
        self._background = Background() if background else None
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: Group = None

    # ------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        policy: Checkpointable,
        trainer_state: dict[str, Any],
        extra_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write the checkpoint of a step, then remove those older than the newest ``keep_last``.

        In the background this returns before it is written: ``wait`` raises what went wrong.

        Args:
            step: training steps done, at least 1: before that the optimizer has no state to save.
            policy: its state is read before this returns.
            trainer_state: what JSON can hold unchanged; rank 0's is kept.
            extra_files: content by file name, checked like all other parts at loading; rank 0's are kept.

        Returns:
            The directory that the checkpoint has, or will have.

        Raises:
            CheckpointError: on all ranks, for a failure on any (a full disk); earlier checkpoints are as they were.
        """
        if step < 1:
            raise ValueError(f"step {step}: nothing to save before the first optimizer step")
        self.wait()
        start = time.monotonic()
        background = self._background
        if background is not None and self._group is None and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        replicas = parallel.groups().data
        content = torch_dist.snapshot(policy.sharded_state_dict(), replicas, copied=background is not None)
        write = functools.partial(self._write, step, content, trainer_state, dict(extra_files or {}), start)
        if background is not None:
            background.start(write)
        else:
            write()
        return self.directory.of(step)

    def failed(self) -> bool:
        """True once a save in the background has failed here; then all ranks ``wait`` for the error. Not collective."""
        return self._background is not None and self._background.failed()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            CheckpointError: as ``save``, of the one that was under way.
            RunError: it has not ended within the time that collectives have.
        """
        if self._background is not None:
            self._background.wait(self._timeout.total_seconds())

    def close(self) -> None:
        """Leave no save half done where there is an error already."""
        if self._background is not None:
            self._background.close()

    def _write(
        self,
        step: int,
        content: torch_dist.Snapshot,
        trainer_state: dict[str, Any],
        extra: dict[str, bytes],
        start: float,
    ) -> None:
        """Write and commit a snapshot; on the main thread or in the background."""
        directory, group = self.directory, self._group
        partial = directory.partial(step)
        try:
            on_first_rank(lambda: directory.begin(step, extra), group, CheckpointError)
            torch_dist.write(content, partial, group)
            sealed = on_all_ranks(lambda: seal_own_files(partial), group, CheckpointError)
            files = {name: record for part in sealed for name, record in part.items()}
            whole = Manifest(step, self.config_digests[0], trainer_state, layout(), versions(), files)
            on_first_rank(lambda: directory.commit(whole), group, CheckpointError)
        except CheckpointError as error:
            if parallel.rank() == 0:
                remove_directory(partial)
            raise CheckpointError(
                f"the checkpoint of step {step} was not saved in {directory.path} ({free_space(directory.path)}); "
                f"earlier ones are as they were: {error}"
            ) from error
        self.seconds = time.monotonic() - start
        on_first_rank(lambda: directory.prune(directory.of(step)), group, CheckpointError)

    # ------------------------------------------------------------------ loading

    def latest(self) -> Path | None:
        """The newest checkpoint, unverified; None without any. Not collective."""
        steps = self.directory.steps()
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
        header = on_first_rank(lambda: torch_dist.read_header(path), failure=CheckpointError)
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
        for path in reversed(on_first_rank(self.directory.at_start, failure=CheckpointError)):
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
            on_first_rank(functools.partial(self.directory.loaded, path, damaged), failure=CheckpointError)
            self.resumed_from = path
            return state
        if damaged:
            reasons = "; ".join(damaged.values())
            raise CheckpointError(f"no checkpoint in {self.directory.path} is whole: {reasons}")
        return None

    def _verify(self, path: Path) -> Manifest:
        """Check whose the checkpoint is and then every file; the ranks share the reading."""
        content = on_first_rank(lambda: manifest.read(path), failure=CheckpointError)
        if content.config_digest not in self.config_digests:
            raise CheckpointError(
                f"{path} belongs to another configuration: its digest is {content.config_digest}, this run's "
                f"{self.config_digests[0]}. Resume with the settings it was saved under, or use another run.dir"
            )
        if step_of(path.name) not in (None, content.step):
            raise DamagedCheckpointError(f"{path} was renamed: its manifest says step {content.step}")
        check_files(path, content)
        return content


def check_files(path: Path, content: Manifest) -> None:
    """Compare every file of a checkpoint with its manifest; the ranks share the reading. Collective.

    Raises:
        DamagedCheckpointError: on all ranks: which files are missing, truncated or altered.
    """
    own = manifest.shard_of(content.files, parallel.rank(), dist.get_world_size())
    checked = on_all_ranks(
        lambda: [manifest.problem_with(path, name, content.files[name]) for name in own], failure=CheckpointError
    )
    problems = [problem for part in checked for problem in part if problem]
    if problems:
        raise DamagedCheckpointError("; ".join(problems))


def seal_own_files(directory: Path) -> dict[str, manifest.FileRecord]:
    """Bring the files to the disk that this rank wrote, and record them."""
    names = (str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    own = manifest.shard_of(names, parallel.rank(), dist.get_world_size())
    return {name: manifest.seal(directory / name) for name in own}


def layout() -> dict[str, int]:
    """The number of ranks and the parallel sizes, for a manifest."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel.tensor_parallel_size(),
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size(),
        "context_parallel_size": parallel.context_parallel_size(),
        "expert_model_parallel_size": parallel.expert_parallel_size(),
        "data_parallel_size": parallel.batch_parallel_size(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that write a checkpoint, for a manifest."""
    return {
        "nemo_aapo": nemo_aapo.__version__,
        "megatron_core": megatron.core.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
