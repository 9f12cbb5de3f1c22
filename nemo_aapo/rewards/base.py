"""What a reward is, and how a list of them judges one completion."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from nemo_aapo.types import Completion, Prompt


class Reward(Protocol):
    """Judges one completion. Rewards are frozen dataclasses: their fields are the parameters of the configuration.

    A reward must be a pure function of its arguments: it runs in any of several processes, in any order.

    Example::

        @dataclass(frozen=True)
        class Short(Reward):
            most_tokens: int = 100
            kind: ClassVar[str] = "short"

            def __call__(self, prompt, text, completion):
                return float(len(completion.token_ids) <= self.most_tokens)
    """

    kind: ClassVar[str]
    """The name in the configuration."""
    takes_integers: ClassVar[bool] = False
    """Whether ``check_answer`` is known to take every whole number of up to 15 digits: a million are then not asked."""

    @property
    def name(self) -> str:
        """The name in metrics (``reward/<name>``)."""
        return self.kind

    @property
    def in_process(self) -> bool:
        """True if it is cheap and always ends, so that it may run without a worker process to kill."""
        return True

    def __call__(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """The finite value of a completion.

        Args:
            prompt: with the gold answer.
            text: the completion decoded, without padding and the token that ended it.
            completion: its tokens, and how it ended.
        """
        ...

    def check_answer(self, answer: str) -> None:
        """Raise ValueError if this gold answer can't be worked with. Called when data is loaded."""
        return None

    def depends_on(self) -> dict[str, Any]:
        """What its values depend on besides its parameters: versions of libraries, a digest of code. Plain values."""
        return {}

    def load(self) -> None:
        """Import what scoring needs; raises what is wrong with it. Called once a worker, before its first item."""
        return None


def score_parts(
    rewards: Sequence[Reward], prompt: Prompt, text: str, completion: Completion
) -> tuple[list[float | None], str]:
    """Each reward's value, None where it raised or gave no finite number; and why, in one line (empty: all is well).

    A process that a reward forked and that comes back from it ends here: it must not go on as a second worker.
    """
    parts: list[float | None] = []
    problems = []
    process = os.getpid()
    for reward in rewards:
        value: float | None = None
        try:
            value = float(reward(prompt, text, completion))
            if not math.isfinite(value):
                raise ValueError(f"{value} is not finite")
        except (Exception, SystemExit) as error:  # whatever a reward raises, its value is missing and the run goes on
            value = None
            problems.append(f"{reward.name}: {describe_error(error)}")
        finally:
            if os.getpid() != process:
                os._exit(1)
        parts.append(value)
    return parts, "; ".join(problems)


def describe_error(error: BaseException) -> str:
    """An exception in one line: its type, its message and the place that raised it."""
    what = traceback.format_exception_only(error)[-1].strip()[:500]
    if isinstance(error, SyntaxError):
        return f"{what} ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f"{what} ({frames[-1].filename}:{frames[-1].lineno})" if frames else what
