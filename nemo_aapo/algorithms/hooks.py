"""An algorithm's hooks called: their errors in words that name the line, and what they give looked at.

A hook is a user's code. What it raises or gives wrongly ends the run by a message of what, where and the remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from nemo_aapo.algorithms.base import Algorithm, Loss, ScoredGroups, Tokens
from nemo_aapo.errors import AlgorithmError, ConfigError, RunError, one_line

OF_THE_STEP = frozenset({"loss", "grad_norm", "lr", "entropy"})
"""Metrics of the learner besides those that a loss comes with."""


def advantages(algorithm: Algorithm, groups: ScoredGroups) -> np.ndarray:
    """float64 [N, G] by the algorithm's hook; what stands where a reward is NaN may be anything.

    Raises:
        AlgorithmError: the hook raised something, or gave something else.
    """
    with _in_words(algorithm, "advantages"):
        made = algorithm.advantages(groups)
        values = np.asarray(made)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"gave {_what(made)}: an array of numbers is needed, one for each completion")
        if values.shape != groups.rewards.shape:
            raise ValueError(f"gave an array {values.shape} for rewards {groups.rewards.shape}")
        return values.astype(np.float64)


def token_loss(algorithm: Algorithm, tokens: Tokens, taken: Collection[str]) -> Loss:
    """Loss and metrics of a micro-batch by the algorithm's hook.

    Args:
        taken: names of metrics that there are already.

    Raises:
        AlgorithmError: the hook raised something, gave something else than a loss and its metrics, or wrote into a
            tensor that it was given.
    """
    tensors = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    before = {name: value._version for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    with _in_words(algorithm, "token_loss"):
        made = algorithm.token_loss(tokens)
        if written := [name for name, version in before.items() if tensors[name]._version != version]:
            raise ValueError(f"wrote into tokens.{written[0]}, which is used again: make a tensor of your own of it")
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
            raise ValueError(f"gave {_what(made)}: a loss and a mapping of metrics are needed, as in return loss, {{}}")
        _check_loss(made[0], needs_gradient=tokens.logprobs.requires_grad)
        _check_metrics(made[1], {*taken, *OF_THE_STEP})
        return made


def metrics(algorithm: Algorithm, groups: ScoredGroups, advantages: np.ndarray) -> dict[str, float]:
    """Numbers of a step by the algorithm's hook.

    Raises:
        AlgorithmError: the hook raised something, or gave something else.
    """
    with _in_words(algorithm, "metrics"):
        return {str(name): float(value) for name, value in algorithm.metrics(groups, advantages).items()}


def _check_loss(value: Any, *, needs_gradient: bool) -> None:
    if not isinstance(value, torch.Tensor) or value.ndim or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gave {_what(value)} as loss: a scalar tensor of float32 is needed, the sum over the tokens")
    if needs_gradient and not value.requires_grad:
        raise ValueError("gave a loss without a gradient: it must come from tokens.logprobs, not from their detach()")


def _check_metrics(values: Mapping[str, Any], taken: Collection[str]) -> None:
    for name, value in values.items():
        if name in taken:
            raise ValueError(f"gave a metric {name!r}: there is one of that name already, choose another")
        if not isinstance(value, torch.Tensor) or value.ndim:
            raise ValueError(
                f"gave {_what(value)} as metric {name!r}: a scalar tensor is needed, the sum over the tokens"
            )
        if value.requires_grad:
            raise ValueError(f"gave a metric {name!r} that carries a gradient, which keeps the graph alive: detach it")


def _what(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


@contextlib.contextmanager
def _in_words(algorithm: Algorithm, hook: str) -> Iterator[None]:
    """Inside, an error becomes one that names the hook, and the line of the algorithm's file that it came from."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except Exception as error:
        place = _place(type(algorithm), error)
        said = f"failed with {type(error).__name__}: {one_line(error)} ({place})" if place else one_line(error)
        raise AlgorithmError(f"{type(algorithm).__name__}.{hook} {said}") from error


def _place(kind: type, error: Exception) -> str:
    """``my_algorithm.py:17: x = y[3]``, the innermost line of the class's file that the error came through; empty where
    it came through none."""
    try:
        file = inspect.getfile(kind)
    except (TypeError, OSError):  # a class made in a console
        file = ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
