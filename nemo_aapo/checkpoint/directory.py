"""The directory of a run's checkpoints, as plain files: what is there, what is in the way, what may go.

One rank works here; nothing is collective, and there is no torch. ``checkpointer.py`` explains the names.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nemo_aapo.checkpoint import manifest
from nemo_aapo.checkpoint.manifest import Manifest
from nemo_aapo.errors import CheckpointError
from nemo_aapo.run.names import step_name, step_of
from nemo_aapo.utils.files import begin_directory, commit_directory, partial_of, remove_directory

logger = logging.getLogger(__name__)


class CheckpointDirectory:
    """The checkpoints of one run, each from its partial directory to its removal."""

    def __init__(self, path: Path | str, keep_last: int, keep_best: str | None) -> None:
        """Touch no file. The arguments are ``Checkpointer``'s."""
        self.path = Path(path)
        self.keep_last, self.keep_best = keep_last, keep_best

    def of(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.path / step_name(step)

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it gets its name."""
        return partial_of(self.of(step))

    def steps(self) -> list[Path]:
        """The checkpoints that there are, oldest first."""
        found = {step: path for path in self.path.glob("step_*") if (step := step_of(path.name)) is not None}
        return [found[step] for step in sorted(found)]

    # ------------------------------------------------------------------ saving

    def begin(self, step: int, extra_files: Mapping[str, bytes]) -> None:
        """Make the partial directory, with these files in it.

        Raises:
            CheckpointError: the step has a checkpoint already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if self.of(step).exists():
            raise CheckpointError(f"{self.of(step)} exists already, and is not overwritten")
        partial = begin_directory(self.of(step))
        for name, content in extra_files.items():
            (partial / name).write_bytes(content)

    def commit(self, content: Manifest) -> None:
        """Write the manifest, and give the partial directory its name once all of it is on the disk."""
        partial = self.partial(content.step)
        manifest.write(content, partial)
        commit_directory(partial, self.of(content.step))

    def prune(self, newest: Path) -> None:
        """Remove the checkpoints that are older than this one and not among the ``keep_last`` up to it."""
        steps = self.steps()
        older = steps[: steps.index(newest)] if newest in steps else []
        kept = self._kept_for_their_value(steps)
        for path in older[: max(0, len(older) - self.keep_last + 1)]:
            if path not in kept:
                remove_directory(path)

    def _kept_for_their_value(self, paths: list[Path]) -> set[Path]:
        """The checkpoint with the highest value of ``keep_best``, the newest of equals; none where none has one.

        Those whose value can't be read stay as well: any of them may be the best.
        """
        known: list[tuple[float, Path]] = []
        unknown = set[Path]()
        for path in reversed(paths if self.keep_best is not None else []):
            try:
                value = manifest.read(path).trainer_state.get("metrics", {}).get(self.keep_best)
            except CheckpointError as error:
                logger.warning("%s stays: whether it is the best can't be read: %s", path.name, error)
                unknown.add(path)
            else:
                known += [(value, path)] if value is not None else []
        return unknown | ({max(known, key=lambda pair: pair[0])[1]} if known else set())

    def _remove_leftovers(self) -> None:
        for path in self.path.glob(".step_*"):
            if path.suffix in (".partial", ".removing"):
                logger.warning("removing what an interrupted run left: %s", path)
                remove_directory(path)

    # ------------------------------------------------------------------ loading

    def at_start(self) -> list[Path]:
        """Checkpoints by step, after a look whether the directory can be written.

        Raises:
            CheckpointError: there is something that looks like a checkpoint, but none to resume from.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path):  # that nothing can be saved shows now, not hours later
            self._remove_leftovers()
        steps = self.steps()
        strange = [path.name for path in self.path.glob("step_*")]
        if strange and not steps:
            raise CheckpointError(
                f"{self.path} holds {', '.join(sorted(strange))} but no step_NNNNNN to resume from: "
                "move them away to start afresh"
            )
        return steps

    def loaded(self, path: Path, damaged: Mapping[Path, str]) -> None:
        """A checkpoint was loaded: put damaged newer ones out of the way, and remove older ones.

        A kill may have come between a save and the removal of older ones.
        """
        for newer, reason in damaged.items():
            ends = itertools.chain([""], map(".{}".format, itertools.count(2)))
            names = (newer.with_name(f"{newer.name}.damaged{end}") for end in ends)
            aside = next(name for name in names if not name.exists())
            os.rename(newer, aside)
            logger.warning("went back to %s, since %s; what there is of %s is now %s", path, reason, newer, aside)
        self.prune(path)
