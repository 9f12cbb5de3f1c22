"""What a run leaves for people and tools: configuration, metrics, samples of rollouts, loggers, the final marker.

    <run_dir>/  config.yaml  run.json  phase.json  metrics.jsonl  rollouts/  trace/  tensorboard/  logs/  report.html
                finished

Only rank 0 holds an ``Experiment``; the others hold a ``SilentExperiment``, so that the trainer's loop is the same on
all ranks. NeMo's ``exp_manager`` makes the loggers of TensorBoard and Weights & Biases, and its own log files.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.config import Config
from nemo_aapo.errors import RunError, first_line, one_line
from nemo_aapo.run.directory import claim, resumed
from nemo_aapo.run.metrics_file import MetricsFile
from nemo_aapo.run.names import PHASE, ROLLOUTS, TRACES, step_name, step_of
from nemo_aapo.types import Group
from nemo_aapo.utils.files import FINISHED, to_json, write_atomic
from nemo_aapo.utils.libraries import import_nemo, importing

RUN_TAG = "nemo_aapo_run"
"""MLflow's runs have an id of MLflow's choice; this tag holds the run's own."""

MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Unless the environment says otherwise: MLflow's own 120 s and 7 retries would hold a step for many minutes."""


def open_experiment(
    config: Config, tree: Mapping[str, Any], *, rank: int, world_size: int
) -> Experiment | SilentExperiment:
    """The record of this run, on rank 0; on other ranks one that takes every call and writes nothing.

    Args:
        tree: the resolved configuration as a plain tree, as ``config_main`` hands it over.

    Raises:
        ConfigError: the run directory is in use, or holds a run with another configuration.
    """
    return Experiment(config, tree, world_size) if rank == 0 else SilentExperiment()


class Experiment:
    """Writes the run directory. Call ``resume_at`` once before the first line is logged."""

    def __init__(self, config: Config, tree: Mapping[str, Any], world_size: int) -> None:
        self.directory = Path(config.run.dir)
        self._lock, run_id = claim(config, tree, world_size)
        self.warnings: list[str] = []
        """What a resumed run is told about this machine, its algorithm and its files."""
        self.save_phase(None)
        self._metrics = MetricsFile(self.directory / "metrics.jsonl")
        self.loggers = nemo_loggers(config, run_id)
        """lightning's."""
        for logger in self.loggers:
            _begin(logger, tree)
        self._last_step: int | None = None

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close("success" if kind is None else "failed")

    def resume_at(self, step: int, *, validated: bool = True) -> None:
        """Take the record back to the state after ``step`` optimizer steps; -1: nothing was done, it begins empty.

        Lines, rollout files and traces of later steps come from a part of the run that ended after its last checkpoint;
        they are removed. Lines of ``step`` itself stay, so ``sync`` before its checkpoint is written; lines that are
        missing are told in ``warnings``.

        Args:
            validated: False: the validation of ``step`` is still to be made, and what an earlier part that made it left
                of it is removed too.
        """
        self.warnings += resumed(self.directory, step)
        last = self._metrics.truncate_after(step, validated=validated)
        if last < step:
            self.warnings.append(
                f"{self._metrics.path} ends at step {max(last, 0)}, before the checkpoint of step {step}: lines were "
                "lost, by a crash of the machine or in a copy. Metrics and charts have a gap; nothing else has"
            )
        for path in (*(self.directory / ROLLOUTS).glob("*_*.*"), *(self.directory / TRACES).glob("step_*.json")):
            if any((step_of(path.stem, kind) or 0) > step for kind in ("step", "train")):
                path.unlink()
        if not validated:
            (self.directory / ROLLOUTS / f"{step_name(step)}.jsonl").unlink(missing_ok=True)
        (self.directory / FINISHED).unlink(missing_ok=True)
        for logger in self.loggers:
            _forget_after(logger, step)
        self._last_step = step

    def sync(self) -> None:
        """Return when the lines so far are on the disk; to be called before a checkpoint of their step is."""
        self._metrics.sync()

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One training step, to ``metrics.jsonl`` and all loggers.

        Raises:
            RuntimeError: ``resume_at`` was not called, or the step is not later than the last one.
        """
        if self._last_step is None or step <= self._last_step:
            raise RuntimeError(f"step {step} can't be logged after step {self._last_step}")
        self._last_step = step
        self._log(step, metrics)

    def log_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One validation of the weights after ``step`` optimizer steps."""
        if self._last_step is None:
            raise RuntimeError("resume_at() comes before the first line")
        self._log(step, metrics)

    def save_phase(self, phase: Mapping[str, Any] | None) -> None:
        """``phase.json``: the work at hand that is no step, for ``status``; None removes it."""
        if phase is None:
            (self.directory / PHASE).unlink(missing_ok=True)
        else:
            write_atomic(self.directory / PHASE, to_json(phase) + "\n")

    def save_rollouts(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """``rollouts/NAME.jsonl``: one JSON object a completion, as ``rollout_rows`` makes them."""
        write_atomic(self.directory / ROLLOUTS / f"{name}.jsonl", "".join(to_json(row) + "\n" for row in rows))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete: close the loggers, then write the ``finished`` marker, the last file of a run."""
        self._close_loggers("success")
        write_atomic(self.directory / FINISHED, to_json(summary) + "\n")
        self._lock.close()

    def close(self, status: str = "success") -> None:
        """Flush everything and give the run directory back. Does nothing after ``finish``."""
        if not self._lock.closed:
            self._close_loggers(status)
            self._lock.close()

    def _close_loggers(self, status: str) -> None:
        self._metrics.close()
        self._tell_loggers(lambda logger: logger.finalize(status))

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.append(step, metrics)
        numbers = {key: float(value) for key, value in metrics.items()}
        self._tell_loggers(lambda logger: logger.log_metrics(numbers, step=step))

    def _tell_loggers(self, tell: Callable[[Any], None]) -> None:
        """A logger that fails, as when its server has gone away, is left out from then on: it ends no run."""
        for logger in list(self.loggers):
            try:
                tell(logger)
            except Exception as error:  # the loggers' libraries raise their own, and the network's
                self.loggers.remove(logger)
                name = type(logger).__name__
                print(f"warning: {name} is left out from now on: {first_line(error)}", file=sys.stderr, flush=True)


class SilentExperiment:
    """What ranks other than 0 hold: the methods of ``Experiment``, without effect."""

    warnings: Sequence[str] = ()
    loggers: Sequence[Any] = ()

    def __enter__(self) -> SilentExperiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None: ...

    def resume_at(self, step: int, *, validated: bool = True) -> None: ...

    def sync(self) -> None: ...

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_validation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def save_phase(self, phase: Mapping[str, Any] | None) -> None: ...

    def save_rollouts(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def close(self, status: str = "success") -> None: ...


def rollout_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each completion of some groups, for people; none where the texts are not on this rank."""
    return [
        {
            "prompt": group.prompt.text,
            "completion": text,
            "reward": group.rewards[i],
            "reward_parts": {name: values[i] for name, values in group.reward_parts.items()},
            "advantage": None if group.advantages is None else group.advantages[i],
            "answer": group.prompt.answer,
            "finish_reason": group.completions[i].finish_reason,
            "tokens": len(group.completions[i].token_ids),
            "source": group.prompt.source,
        }
        for group in groups
        for i, text in enumerate(group.texts)
    ]


def nemo_loggers(config: Config, run_id: str) -> list[Any]:
    """The loggers that NeMo's ``exp_manager`` makes: lightning ``Logger`` objects.

    ``exp_manager`` wants a lightning Trainer, which trains nothing here, and a directory of its own, as it moves
    every file that it finds there into ``run_0/`` when a run is resumed: it gets ``logs/nemo/`` and is told where
    TensorBoard's files go.
    """
    settings = config.exp_manager
    mlflow = [_mlflow_logger(config, run_id)] if settings.create_mlflow_logger else []
    if not (settings.create_tensorboard_logger or settings.create_wandb_logger):
        return mlflow  # and NeMo need not be imported
    import_nemo()
    with importing():
        import lightning.pytorch
        from lightning.pytorch.plugins.environments import LightningEnvironment
        from nemo.utils.exp_manager import exp_manager

    trainer = lightning.pytorch.Trainer(
        devices=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        plugins=[LightningEnvironment()],  # or it takes torchrun's or Slurm's ranks for its own
    )
    base = Path(settings.explicit_log_dir).absolute()
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(base / "logs" / "nemo"),
            "create_tensorboard_logger": settings.create_tensorboard_logger,
            "summary_writer_kwargs": {"sub_dir": str(base / "tensorboard"), "default_hp_metric": False},
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": {
                "save_dir": str(base),
                "id": run_id,  # a resumed run goes on in the same place
                "resume": "allow",
                **settings.wandb_logger_kwargs,
            },
            "create_checkpoint_callback": False,
            "resume_if_exists": False,
            "log_step_timing": False,
        },
    )
    return [*trainer.loggers, *mlflow]


def _mlflow_logger(config: Config, run_id: str) -> Any:
    """Lightning's logger by the settings that ``exp_manager`` has for it, which in NeMo 2.7.3 can't make one: it hands
    over ``run_name`` twice. A resumed run goes on under the run that it began, known by a tag."""
    with importing():
        from lightning.pytorch.loggers import MLFlowLogger

    for name, value in MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    given = dict(config.exp_manager.mlflow_logger_kwargs)
    local = f"file:{Path(config.exp_manager.explicit_log_dir).absolute() / 'mlruns'}"
    given["tracking_uri"] = given.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or local
    given["tags"] = {**(given.get("tags") or {}), RUN_TAG: run_id}
    return MLFlowLogger(**{"run_id": _begun_mlflow_run(given, run_id), **given})


def _begun_mlflow_run(given: Mapping[str, Any], run_id: str) -> str | None:
    """MLflow's id of a run that an earlier start has begun; None: there is none."""
    from mlflow.tracking import MlflowClient

    with _said_of("MLflow"):
        client = MlflowClient(given["tracking_uri"])
        experiment = client.get_experiment_by_name(given["experiment_name"])
        found = client.search_runs([experiment.experiment_id], f"tags.{RUN_TAG} = '{run_id}'") if experiment else []
    return found[0].info.run_id if found else None


def _begin(logger: Any, tree: Mapping[str, Any]) -> None:
    """Have a logger say what runs, which is when it connects."""
    with _said_of(type(logger).__name__):
        if getattr(logger, "_run_id", None) is None:  # MLflow refuses other values for a run that it has already
            logger.log_hyperparams(tree)
        assert logger.experiment is not None


@contextlib.contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Whatever a tracking library raises at its start is a message: a wrong key, a server that refuses.

    Raises:
        RunError: in the library's words.
    """
    try:
        yield
    except Exception as error:
        raise RunError(f"{name} does not start: {one_line(error)}. See docs/guide/training.md, Loggers") from error


def _forget_after(logger: Any, step: int) -> None:
    """Tell TensorBoard to leave out what an interrupted part wrote after its last checkpoint."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    if isinstance(logger, TensorBoardLogger):
        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        logger.experiment.file_writer.add_event(restart, step + 1)
