"""What the loop needs of its parts: whatever keeps to these can stand in for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_aapo.types import Group, Prompt

if TYPE_CHECKING:
    from nemo_aapo.checkpoint.checkpointer import Checkpointable, ResumeMode
    from nemo_aapo.rollout.kept import KeptGroup
    from nemo_aapo.run.step_metrics import GroupNumbers


class Policy(Protocol):
    """The weights that are trained; ``learner.policy.MegatronPolicy``."""

    @property
    def version(self) -> int:
        """Optimizer steps taken so far."""
        ...

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def export(self, directory: str, stop: Callable[[], bool] = ...) -> None: ...


class Rollouts(Protocol):
    """Where each step's groups come from; ``rollout.pipeline.RolloutPipeline``."""

    runs_ahead: bool
    seconds: dict[str, float]
    metrics: dict[str, float]

    def fill_reference(
        self, step: int, report: Callable[[int, int], None], stop_requested: Callable[[], bool]
    ) -> bool: ...
    def generate(self, step: int) -> list[Group]: ...
    def begin(self, step: int) -> None: ...
    def settle(self) -> object: ...
    def refit(self) -> None: ...
    def epochs(self, step: int) -> float: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def pending_files(self) -> dict[str, bytes]: ...
    def load_pending(self, checkpoint: Path, step: int) -> None: ...
    def recover(self) -> None: ...
    def checkpointed(self, step: int) -> None: ...


class Learner(Protocol):
    """Scored groups in, optimizer steps out; ``learner.learner.Learner``."""

    def update(self, groups: Sequence[Group]) -> dict[str, float]: ...
    def parity(self, groups: Sequence[Group]) -> dict[str, float]: ...


class Kept(Protocol):
    """What is kept of each step's rollouts for people; ``rollout.kept.KeptRollouts``."""

    def choose(self, step: int, groups: Sequence[Group]) -> list[KeptGroup]: ...
    def write(self, step: int, kept: Sequence[KeptGroup]) -> None: ...
    def wait(self) -> None: ...


class Throughput(Protocol):
    """How much of the hardware a step used; ``training.throughput.Throughput``."""

    def metrics(self, groups: Sequence[GroupNumbers], seconds: Mapping[str, float]) -> dict[str, float]: ...


class Validator(Protocol):
    """Measures the policy on held-out prompts; ``evaluation.validation.Validator``."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...
    def run(self) -> tuple[dict[str, float], list[dict[str, Any]]]: ...


class Checkpoints(Protocol):
    """Saves and resumes; ``checkpoint.checkpointer.Checkpointer``."""

    seconds: float
    resumed_from: Path | None

    def resume(self, policy: Checkpointable, mode: ResumeMode) -> dict[str, Any] | None: ...
    def save(
        self,
        step: int,
        policy: Checkpointable,
        trainer_state: dict[str, Any],
        extra_files: Mapping[str, bytes] | None = None,
    ) -> object: ...
    def failed(self) -> bool: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...
