"""The settings of a training run: field for field those of ``conf/train_aapo.yaml`` (a test holds the two together)."""

from __future__ import annotations

from typing import Any, Literal

from nemo_aapo.config.schema.algorithm import AlgorithmConfig
from nemo_aapo.config.schema.cluster import Cluster
from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import COMPLETIONS, NODES, RANKS_OF_NODE, SECONDS, SEED, STEPS, TOKENS
from nemo_aapo.config.schema.model import Model
from nemo_aapo.config.schema.rollout import Data, RewardRunnerConfig, Rollout, Validation


@section
class Run:
    """Name and place of the run."""

    name: str = setting("names the run; part of the default run directory", decides=False, main=True)
    dir: str = setting(
        "everything the run leaves: config, metrics, rollouts, checkpoints, model", decides=False, main=True, path=True
    )


@section
class Trainer:
    """Ranks, steps, deadlines."""

    num_nodes: int = setting(
        "machines; under torchrun what it started, else 1", decides=False, minimum=1, main=True, sane=NODES
    )
    devices: int = setting(
        "ranks on each machine, likewise; ranks / (tensor x pipeline) = data-parallel size",
        decides=False,
        minimum=1,
        main=True,
        sane=RANKS_OF_NODE,
    )
    max_steps: int = setting(
        "optimizer steps of the whole run, resumed parts included; may grow (with rollouts ahead, to other bits)",
        decides=("model.optim.sched.name", "cosine"),
        minimum=0,
        main=True,
        sane=STEPS,
    )
    val_check_interval: int = setting(
        "validate every so many steps (and before the first and after the last); 0: never",
        decides=False,
        minimum=0,
        main=True,
        sane=STEPS,
    )
    distributed_timeout_s: float = setting(
        "a collective that waits longer than this ends the run with an error", decides=False, above=0, sane=SECONDS
    )
    fault_timeout_s: float = setting(
        "scripts/launch.py: once a rank has failed, the others end within this or are killed",
        decides=False,
        above=0,
        sane=SECONDS,
    )


@section
class Checkpoint:
    """When to save, what to keep, how to resume."""

    save_interval: int = setting(
        "steps between checkpoints; one is always written at the end and at a stop signal",
        decides=False,
        minimum=1,
        main=True,
        sane=STEPS,
    )
    save_interval_s: float | None = setting(
        "also save once so many seconds have passed since the last checkpoint", decides=False, minimum=1, sane=SECONDS
    )
    max_time_s: float | None = setting(
        "save and stop before the run has taken so many seconds: for jobs with a time limit",
        decides=False,
        minimum=1,
        sane=SECONDS,
    )
    async_save: bool = setting(
        "write checkpoints while training goes on, from a copy in the host's memory", decides=False
    )
    keep_last: int = setting(
        "so many of the newest checkpoints stay; older ones are removed", decides=False, minimum=1, sane=1_000_000
    )
    keep_best: Literal["validation/accuracy_greedy", "validation/accuracy_sampled", "reward/mean"] | None = setting(
        "this metric's best checkpoint stays, too; a validation's: one is saved after each validation", decides=False
    )
    resume: Literal["auto", "latest_good"] = setting(
        "auto: from the newest, or not at all | latest_good: from the newest that is whole", decides=False
    )


@section
class ExpManager:
    """NeMo's exp_manager: logs and loggers."""

    explicit_log_dir: str = setting("where logs and loggers write; follows run.dir", decides=False, path=True)
    create_tensorboard_logger: bool = setting("write curves for TensorBoard to run.dir/tensorboard", decides=False)
    create_wandb_logger: bool = setting("log to Weights & Biases; needs its login, or offline: true", decides=False)
    wandb_logger_kwargs: dict[str, Any] = setting("what lightning's WandbLogger takes", decides=False)
    create_mlflow_logger: bool = setting("log to MLflow", decides=False)
    mlflow_logger_kwargs: dict[str, Any] = setting(
        "what lightning's MLFlowLogger takes; without a tracking_uri by MLFLOW_TRACKING_URI, else to run.dir/mlruns",
        decides=False,
    )


@section
class Trace:
    """Where the time of single steps goes."""

    steps: tuple[int, ...] = setting(
        "steps of which run.dir/trace/ gets a timeline for ui.perfetto.dev, such as [10, 11]",
        decides=False,
        minimum=1,
        sane=STEPS,
    )


@section
class Precision:
    """Numbers and kernels."""

    name: Literal["auto", "fp32", "bf16", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed"] = setting(
        "auto: bf16 on a GPU, fp32 on a CPU | fp32 | bf16 | fp8_tensorwise | fp8_blockwise | fp8_delayed", decides=True
    )
    num_layers_at_start_in_bf16: int = setting(
        "with FP8: so many first layers stay in bf16", decides=True, minimum=0, sane=100_000
    )
    num_layers_at_end_in_bf16: int = setting(
        "with FP8: so many last layers stay in bf16; embedding, output layer and attention always do",
        decides=True,
        minimum=0,
        sane=100_000,
    )


@section
class Config:
    """The whole run; field for field what ``conf/train_aapo.yaml`` says."""

    run: Run
    seed: int = setting(
        "decides prompt order and sampling; the same seed gives the same run",
        decides=True,
        minimum=0,
        main=True,
        sane=SEED,
    )
    prompts_per_step: int = setting(
        "prompts of one training step, over all data-parallel ranks", decides=True, minimum=1, main=True, sane=1_000_000
    )
    group_size: int = setting("G: completions of each prompt", decides=True, minimum=1, main=True, sane=COMPLETIONS)
    max_tokens_per_microbatch: int = setting(
        "prompt + completion tokens, padding included, of one forward pass on one rank",
        decides=False,
        main=True,
        minimum=1,
        sane=TOKENS,
    )
    trainer: Trainer
    model: Model
    algorithm: AlgorithmConfig
    rollout: Rollout
    data: Data
    rewards: tuple[dict[str, Any], ...] = setting("the reward is the weighted sum of these", decides=True, path=True)
    reward_runner: RewardRunnerConfig
    validation: Validation
    checkpoint: Checkpoint
    export_hf_model: bool = setting("write hf_model/ at the end", decides=False)
    exp_manager: ExpManager
    trace: Trace
    precision: Precision
    dry_run: bool = setting("scripts/launch.py: print the script of the job, write and submit nothing", decides=False)
    cluster: Cluster
