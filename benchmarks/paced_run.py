"""The real loop around a paced learner and paced servers (``paced.py``): seconds of a step, and how old its tokens are.

The learner takes a fixed time for a token that it is trained on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.paced import WAIT_S, Pace, base, serving
from benchmarks.workload import MeanToken, Silent
from nemo_aapo.types import Group, Prompt, SamplingSpec

if TYPE_CHECKING:
    from nemo_aapo.config import Config
    from nemo_aapo.training.trainer import AAPOTrainer

AGREE = {"parity/mult_prob_error": 1.0, "parity/gen_kl": 0.0}


def step_seconds(pace: Pace, folder: Path, *words: str, after: int = 1) -> tuple[float, float]:
    """Of a run at this pace, from the end of its first ``after`` steps on: mean seconds of a step, mean lag of a token.

    Args:
        folder: an empty one.
        words: settings such as ``rollout.async_depth=2``.
    """
    from nemo_aapo.config.compose import load_config

    config = load_config(
        [
            "experiment=quickstart",
            "algorithm=gpg",
            "algorithm.importance_weight_cap=2.0",
            f"run.dir={folder}",
            *(f"{name}={folder}" for name in ("model.path", "data.train", "data.validation")),
            "rollout.engine=remote",
            f"rollout.remote.servers={pace.servers}",
            f"prompts_per_step={pace.prompts}",
            f"group_size={pace.group_size}",
            f"trainer.max_steps={pace.steps}",
            "trainer.val_check_interval=0",
            "checkpoint.save_interval=100000",
            *words,
        ]
    )
    (folder / "config.json").write_text("{}")
    with serving(pace, folder / "servers"), contextlib.ExitStack() as stack:
        trainer, clock = _trainer(pace, config, folder, stack)
        trainer.fit()
    counted = len(clock.ends) - after
    return (clock.ends[-1] - clock.ends[after - 1]) / counted, sum(clock.lags[after:]) / counted


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only rank of a job; nothing here needs Megatron."""
    import torch.distributed as dist

    from nemo_aapo.distributed import parallel

    parallel.join(WAIT_S)
    world: Any = dist.group.WORLD
    parallel.use(parallel.Groups(world, world, world, world, world, world))
    try:
        yield
    finally:
        parallel.leave()


class PacedPolicy:
    """A version, and one small tensor that stands for the weights."""

    def __init__(self) -> None:
        self.version = 0

    def named_weights(self) -> Iterator[tuple[str, Any]]:
        import torch

        yield "w", torch.full((256,), float(self.version))

    def reference_weights(self) -> Any:
        raise NotImplementedError("no algorithm here has a reference")


class PacedLearner:
    """Waits for each token that it is given; the policy is a version further then."""

    def __init__(self, pace: Pace, policy: PacedPolicy) -> None:
        self.pace, self.policy = pace, policy

    def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        return AGREE

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        time.sleep(self.pace.train_token_s * sum(len(c.token_ids) for group in groups for c in group.completions))
        self.policy.version += 1
        return dict(AGREE)


class Clock(Silent):
    """A reporter that notes when each step ended, and how old its tokens were."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.lags: list[float] = []

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.ends.append(time.perf_counter())
        self.lags.append(metrics["rollout/lag"])


class Nothing:
    """Keeps, saves and measures nothing: in place of the trainer's other parts."""

    seconds, resumed_from = 0.0, None

    def resume(self, policy: object, mode: object) -> None: ...
    def save(self, *arguments: object) -> None: ...
    def failed(self) -> bool:
        return False

    def wait(self) -> None: ...
    def begin(self, step: int) -> None: ...
    def end(self) -> None: ...
    def close(self) -> None: ...
    def choose(self, step: int, groups: object) -> list[Any]:
        return []

    def write(self, step: int, kept: object) -> None: ...
    def metrics(self, generated: object, trained: object, seconds: Mapping[str, float]) -> dict[str, float]:
        return {}


def _trainer(pace: Pace, config: Config, folder: Path, stack: contextlib.ExitStack) -> tuple[AAPOTrainer, Clock]:
    """The real loop around a paced learner and paced servers; this process has joined the ranks."""
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.config.sizes import prompts_drawn
    from nemo_aapo.data.sampler import PromptSampler
    from nemo_aapo.engines.remote.dispatch import Fleet
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from nemo_aapo.engines.remote.weight_store import WeightStore
    from nemo_aapo.engines.weights import Weights
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.rollout.collector import Collector
    from nemo_aapo.rollout.in_flight import InFlightPipeline
    from nemo_aapo.rollout.in_order import InOrderPipeline
    from nemo_aapo.training.trainer import AAPOTrainer

    directory, policy, clock, nothing = folder / "servers", PacedPolicy(), Clock(), Nothing()
    fleet = Fleet(directory, servers=pace.servers, wait_s=WAIT_S, timeout_s=WAIT_S, retries=0)
    in_flight: Any = None if config.rollout.max_lag is None else "keeps_kv"
    weights = Weights(base(), None)
    engine = RemoteEngine(fleet, WeightStore(directory, str(folder)), weights, None, in_flight=in_flight)
    stack.callback(engine.close)
    rewards = stack.enter_context(RewardRunner([(MeanToken(), 1.0)], workers=0, timeout_s=WAIT_S))
    data = [Prompt(str(i), np.array([5, i], np.int32), str(i), "0", f"made:{i}") for i in range(pace.prompts * 8)]
    kind = InOrderPipeline if config.rollout.max_lag is None else InFlightPipeline
    pipeline = kind(
        config=config,
        policy=policy,
        collector=Collector(engine, rewards, lambda tokens: ""),
        sampling=SamplingSpec(1.0, 1 << 12, ()),
        prompts=data,
        sampler=PromptSampler(len(data), prompts_drawn(config), config.seed),
        reference=None,
    )
    learner: Any = PacedLearner(pace, policy)
    trainer = AAPOTrainer(
        config=config,
        policy=policy,  # type: ignore[arg-type]
        rollouts=pipeline,
        objective=Objective.of(config.algorithm, config.rollout.max_new_tokens),
        learner=learner,
        validator=nothing,  # type: ignore[arg-type]
        checkpoints=nothing,  # type: ignore[arg-type]
        kept=nothing,  # type: ignore[arg-type]
        throughput=nothing,
        tracer=nothing,
        reporter=clock,
    )
    return trainer, clock
