"""Completions and the page of a run for its trackers: Weights & Biases, MLflow. TensorBoard has no place for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aapo.errors import first_line
from nemo_aapo.run.names import step_name
from nemo_aapo.utils.files import to_json

Row = Mapping[str, Any]
COLUMNS = ("prompt", "completion", "answer", "reward", "finish_reason", "tokens", "source")
ROWS = 64
"""Completions of a table, spread over a validation's."""


class Trackers:
    """The loggers of a run that take more than numbers. A refusal of theirs is a warning: it ends no run."""

    def __init__(self, loggers: Sequence[Any], note: Callable[[str], None]) -> None:
        """
        Args:
            loggers: lightning's, of any kind.
            note: takes a line for people.
        """
        self._loggers = [logger for logger in loggers if type(logger).__name__ in KINDS]
        self._note = note

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        """A table of a validation's completions."""
        chosen = rows[:: max(1, -(-len(rows) // ROWS))]
        table = [[row.get(name) for name in COLUMNS] for row in json.loads(to_json(list(chosen)))]
        self._each(lambda logger, kind: kind[0](logger, step, table))

    def page(self, path: Path) -> None:
        """The page as an artifact."""
        if path.exists():
            self._each(lambda logger, kind: kind[1](logger, path))

    def _each(self, tell: Callable[[Any, tuple[Callable[..., Any], Callable[..., Any]]], Any]) -> None:
        for logger in self._loggers:
            name = type(logger).__name__
            try:
                tell(logger, KINDS[name])
            except Exception as error:  # the trackers' libraries raise their own, and the network's
                self._note(f"warning: {name} did not take what it was given: {first_line(error)}")


def _wandb_table(logger: Any, step: int, table: Sequence[Sequence[Any]]) -> None:
    logger.log_table(key="validation/completions", columns=list(COLUMNS), data=[list(row) for row in table], step=step)


def _wandb_page(logger: Any, path: Path) -> None:
    logger.experiment.log_artifact(str(path), name=f"report-{logger.experiment.id}", type="report")


def _mlflow_table(logger: Any, step: int, table: Sequence[Sequence[Any]]) -> None:
    """In the form that MLflow shows as a table."""
    data = {"columns": list(COLUMNS), "data": [list(row) for row in table]}
    logger.experiment.log_dict(logger.run_id, data, f"completions/{step_name(step)}.json")


def _mlflow_page(logger: Any, path: Path) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path))


KINDS = {"WandbLogger": (_wandb_table, _wandb_page), "MLFlowLogger": (_mlflow_table, _mlflow_page)}
"""Class of a logger -> what gives it a table, and a page."""
