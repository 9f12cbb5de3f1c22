"""The run directory: whose it is, which configuration it belongs to, and that one process at a time writes it."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, TypedDict

import yaml
from typing_extensions import NotRequired

from nemo_aapo.config import (
    END_TOKENS,
    Config,
    Identity,
    decisive_settings,
    digest,
    digests_of_run,
    with_machine_defaults,
)
from nemo_aapo.errors import ConfigError
from nemo_aapo.run.identity import code_of_algorithm, identity_of, reference_of
from nemo_aapo.run.names import STORE, newest_step
from nemo_aapo.run.stop import STOP_FILE
from nemo_aapo.utils.files import (
    LOCK,
    NO_LOCKS,
    fitting,
    read_json,
    require_directory,
    require_followed,
    to_json,
    write_atomic,
)
from nemo_aapo.utils.machine import instruction_set

RECORD = "run.json"
"""What the directory belongs to: digest, settings and what model and data hold; and every start with its versions."""
VERSIONS_OF = ("torch", "megatron-core", "megatron-bridge", "transformers", "nemo-toolkit", "math-verify")
SHOWN_DIFFERENCES = 12


class Record(TypedDict):
    """The content of ``run.json``."""

    id: str
    """8 hex digits, the same over all starts; loggers go on under it."""
    digest: str
    """Digest of what decides the result (``config.digests_of_run``); checkpoints have it too."""
    settings: dict[str, Any]
    """What decides the result (``config.decisive_settings``), with the paths of the last start."""
    contents: NotRequired[Identity]
    """What model and data hold; a run that was last started before this was recorded has none."""
    reference: NotRequired[str | None]
    """Digest of all weights of the base model, where the run compares with them (``identity.reference_of``)."""
    starts: list[dict[str, Any]]
    """Time, host, ranks and versions of each start; the step from which it went on, if it came so far."""


def check_run_directory(config: Config) -> None:
    """Refuse a run directory that can't be written, or holds a run with another configuration. Leaves nothing behind.

    A start that was refused, for its data say, leaves nothing to protect: the mended configuration may go on there.

    Raises:
        ConfigError: why it can't be written; the settings that differ, and what to do; or fewer steps are asked for
            than were made.
    """
    directory = Path(config.run.dir)
    require_directory(directory, f"run.dir={config.run.dir}")
    # Checkpoints may lie on another disk that went away; the lock of an editor, .#NAME, leads nowhere without harm.
    for entry in directory.glob("[!.]*"):
        require_followed(entry, f"run.dir={config.run.dir}")
    record = read_record(directory)
    if record is None or not _has_begun(directory):
        return
    # what is left to the machine is not decided yet where this is asked early: either answer will do
    answers = [config, *(with_machine_defaults(config, on_gpu=on_gpu) for on_gpu in (False, True))]
    identity = identity_of(config)
    if any(record["digest"] in digests_of_run(answer, identity) for answer in answers):
        _refuse_fewer_steps(config)
        return
    different = min((_differences(record, answer, identity) for answer in answers), key=len)
    shown = different[:SHOWN_DIFFERENCES]
    if len(different) > SHOWN_DIFFERENCES:
        shown.append(f"  and {len(different) - SHOWN_DIFFERENCES} more")
    raise ConfigError(
        f"run.dir={config.run.dir} holds a run with another configuration:\n" + "\n".join(shown) + "\n"
        f"Give this run another name (run.name=NAME or run.dir=DIR), set these as they were, or remove {config.run.dir}"
    )


def _refuse_fewer_steps(config: Config) -> None:
    """A run can't end before a step that it has made; the steps after it are in its weights."""
    done, wanted = newest_step(Path(config.run.dir)), config.trainer.max_steps
    if wanted < done:
        raise ConfigError(
            f"trainer.max_steps={wanted}: {config.run.dir} holds a checkpoint of step {done} already. "
            f"trainer.max_steps={done} ends the run there; for a shorter one give it another name (run.name=NAME)"
        )


def _differences(record: Record, config: Config, identity: Identity) -> list[str]:
    """A line for each setting whose value differs from the record's: changed ones before new ones."""
    there, now = _flat(record["settings"]), _flat(json.loads(to_json(decisive_settings(config))))
    contents = record.get("contents", {})  # unknown of a run from before they were recorded: paths stand for them
    if END_TOKENS in contents:
        there[END_TOKENS], now[END_TOKENS] = contents[END_TOKENS], identity[END_TOKENS]
    lines = []
    for key in sorted({*there, *now}, key=lambda key: (key not in there or key not in now, key)):
        same_value = (key in there, there.get(key)) == (key in now, now.get(key))
        same_contents = key in contents and contents[key] == identity.get(key)
        if not same_value and not same_contents:
            lines.append(f"  {key}: {_show(there, key)} there, {_show(now, key)} now")
        elif key in contents and not same_contents:
            lines.append(f"  {key}: {_show(now, key)} holds something else than it did")
    return lines


def claim(config: Config, tree: Mapping[str, Any], world_size: int) -> tuple[TextIO, str]:
    """Make the run directory this process's own: lock it, check it, write ``run.json`` and ``config.yaml``.

    Args:
        tree: the resolved configuration as a plain tree, written for people.
        world_size: ranks of this start, for the record.

    Returns:
        The open lock file, which holds the directory until it is closed; and the run's id, 8 hex digits that stay
        the same over resumes.

    Raises:
        ConfigError: another process uses the directory, it holds a run with another configuration, or a run that
            compares with another base model.
    """
    directory = Path(config.run.dir)
    require_directory(directory, f"run.dir={config.run.dir}")
    lock = lock_directory(directory, config.run.dir)
    try:
        check_run_directory(config)
        reference = _require_reference(config, directory)
    except ConfigError:
        lock.close()
        raise
    identity = identity_of(config)
    before = read_record(directory)
    if before is not None and before["digest"] not in digests_of_run(config, identity):
        before = None  # nothing came of that one, or the check had refused
    record: Record = {
        "id": before["id"] if before else uuid.uuid4().hex[:8],
        "digest": digest(config, identity),
        "settings": decisive_settings(config),
        "contents": identity,
        "reference": reference,
        "starts": [*(before["starts"] if before else ()), _this_start(config, world_size)],
    }
    write_atomic(directory / RECORD, to_json(record) + "\n")
    write_atomic(directory / "config.yaml", yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True))
    return lock, record["id"]


def _require_reference(config: Config, directory: Path) -> str | None:
    """The digest of the base model that the run compares with, which is the one that it has begun with."""
    reference, record = reference_of(config), read_record(directory)
    if record is not None and _has_begun(directory) and record.get("reference", reference) != reference:
        raise ConfigError(
            f"model.path={config.model.path}: some of its weights are others than at the last start of {directory}, "
            "which compares with them (KL, margin): the rest of the run would have another reference. Put the model "
            "back, or give this run another name (run.name=NAME or run.dir=DIR)"
        )
    return reference


def resumed(directory: Path, step: int) -> list[str]:
    """Record from which step this start goes on, -1 for the beginning; what is not as it was when that was reached.

    The checkpoint of a step was written by the last start that went on from an earlier one: not by one that died while
    it loaded, nor by one that went on from there and left no other.

    Returns:
        What to tell whoever resumes on another kind of processor, or with an algorithm of their own that they changed.
        Empty where an earlier version did not record them.
    """
    if (record := read_record(directory)) is None:
        return []
    *before, now = record["starts"]
    earlier = [start for start in before if start.get("from_step", step) < step]
    writer: Mapping[str, Any] = earlier[-1] if earlier else {}
    now["from_step"] = step
    write_atomic(directory / RECORD, to_json(record) + "\n")
    said = []
    if _changed("instruction_set", writer, now):
        said.append(
            f"the checkpoint of step {step} was computed by {writer['instruction_set']}, this machine computes by "
            f"{now['instruction_set']}: the run goes on, but not to the same bits"
        )
    if _changed("algorithm", writer, now):
        said.append(
            f"the file of algorithm.custom has changed since the checkpoint of step {step}: the steps from here on are "
            "of the code as it is now"
        )
    return said


def _changed(fact: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    known = [start.get(fact) for start in (before, now)]
    return None not in known and known[0] != known[1]


def read_record(directory: Path) -> Record | None:
    """What ``run.json`` says; None where there is no run yet.

    Raises:
        ConfigError: the file is damaged, or can't be read.
    """
    remedy = f"Name another run.dir, or remove {directory}"
    return read_json(directory / RECORD, _as_record, ConfigError, remedy)


def _as_record(tree: Any) -> Record:
    for key, kind in (("id", str), ("digest", str), ("settings", dict), ("starts", list)):
        fitting(tree[key], kind)
    for part in (tree.get("contents", {}), *tree["starts"]):
        fitting(part, dict)
    record: Record = tree
    return record


def _has_begun(directory: Path) -> bool:
    """Whether a run has left metrics, a checkpoint or reference rewards there."""
    metrics, checkpoints = directory / "metrics.jsonl", directory / "checkpoints"
    return (
        (metrics.exists() and metrics.stat().st_size > 0)
        or (checkpoints.is_dir() and any(checkpoints.iterdir()))
        or (directory / STORE).exists()
    )


def lock_directory(directory: Path, named: str) -> TextIO:
    """Make the directory, and keep other processes from writing there until the returned file is closed.

    A stop file goes: who had the directory before was asked to stop by it.

    Args:
        named: the directory as the user wrote it.

    Raises:
        ConfigError: another process uses it, it can't be made, or nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir={named}: can't be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(
            f"run.dir={named}: in use by {holder}. Stop that run, or give this one another name (run.name=NAME)"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    (directory / STOP_FILE).unlink(missing_ok=True)
    os.register_at_fork(after_in_child=lock.close)  # a worker that outlives the run must not keep the directory
    return lock


def _this_start(config: Config, world_size: int) -> dict[str, Any]:
    code = code_of_algorithm(config.algorithm.custom)
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "world_size": world_size,
        "instruction_set": instruction_set(),
        **({"algorithm": code} if code else {}),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return found


def _show(settings: dict[str, Any], key: str) -> str:
    return to_json(settings[key]) if key in settings else "not set"
