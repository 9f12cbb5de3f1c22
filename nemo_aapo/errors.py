"""The errors that end a command with a message instead of a traceback, each with its exit code; and texts of others.

ConfigError    what was asked for can't work: exit code 2, found before anything was made where that is possible
RunError       something that a person has to look at happened on the way: exit code 1
"""

from __future__ import annotations

FAILED = 1
"""Exit code of a run that ended with a ``RunError``."""
REFUSED = 2
"""Exit code of what can't work as it was asked for (``ConfigError``)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class ConfigError(ValueError):
    """A setting that can't work; the message names the key, the reason and the remedy."""

    exit_code = REFUSED


class DataError(ConfigError):
    """Data or a tokenizer that can't be used; the message names the file, the line and the remedy."""


class RunError(RuntimeError):
    """Something that a person has to look at. The message says what, where and what to do."""

    exit_code = FAILED


class LostRankError(RunError):
    """This rank waited for another one, which is gone or did not come in time; or its engine can't go on."""


class NonFiniteError(RunError):
    """Loss or gradient is NaN or infinite; the weights were left as they are."""


class DriftError(RunError):
    """A function of an installed library is not the one that its replacement here was written for."""


class AlgorithmError(RunError, ValueError):
    """A hook of an algorithm raised something, or gave something else than it must; the message names hook and line."""


class ParityError(RunError):
    """Engine and learner disagree on the log-probs of the same tokens."""


class CheckpointError(RunError):
    """A checkpoint can't be written, read or used here; the message says which file, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A part of a checkpoint is missing, truncated or altered."""


class StoreError(RunError):
    """The reference store can't be read or written; the message says which file, why, and what to do."""


class RecordsError(RunError):
    """The kept completions of an evaluation can't be used; the message names the file and what to do."""


class MetricsError(RunError, ValueError):
    """A file of metrics is damaged; the message names file, line and what to do."""


class RewardError(RunError):
    """Rewards can't be computed at all: a worker doesn't start, or the pool is closed."""


class SlurmError(RunError):
    """A command of Slurm failed; the message is Slurm's."""


class NoAnswerError(SlurmError):
    """Slurm's controller did not answer. It may when it is asked again."""


class WeightsError(RunError):
    """Weights that a rollout server was handed are not what the trainer wrote."""


class Interrupted(Exception):
    """A stop was asked for in the middle of something that whoever goes on with the run does anew. Not an error."""


class RequestError(RunError, ValueError):
    """An engine has not what a request asks for, however often it is asked; the message names it."""


class WireError(ValueError):
    """A message between trainer and rollout server is not what it should be; the text names the field."""


class ServerError(Exception):
    """One rollout server did not do what it was asked; another may."""


class OtherWeightsError(ServerError):
    """A server has taken other weights since it was asked."""


class WeightsRefusedError(ServerError):
    """A rollout server can't use the weights as they were handed over; in another form it may."""


def one_line(said: object) -> str:
    """An error or a text, its lines joined by semicolons."""
    return "; ".join(line.strip() for line in str(said).splitlines() if line.strip())


def first_line(error: BaseException) -> str:
    """Of the error's text; of one that says nothing, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
