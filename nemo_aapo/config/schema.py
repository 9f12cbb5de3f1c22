"""The schema of a run: field for field what ``conf/train_aapo.yaml`` says (a test holds the two together).

The comments of that page explain each setting; here stand the types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Run:
    """Name and place of the run."""

    name: str
    dir: str


@dataclass(frozen=True)
class Trainer:
    """Ranks, steps, deadlines."""

    num_nodes: int
    devices: int
    max_steps: int
    val_check_interval: int
    distributed_timeout_s: float
    fault_timeout_s: float


@dataclass(frozen=True)
class Sched:
    """The learning rate over the steps."""

    name: Literal["constant", "cosine"]
    warmup_steps: int
    min_lr: float


@dataclass(frozen=True)
class Optim:
    """Adam, as mcore builds it."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    use_distributed_optimizer: bool | None
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    cpu_offload_fraction: float
    sched: Sched


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters that are trained in place of the weights."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """The model, its layout over the ranks, its optimizer."""

    path: str
    trust_remote_code: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    expert_model_parallel_size: int
    sequence_parallel: bool
    sequence_packing: bool | None
    share_prompts: bool | None
    recompute_granularity: Literal["full", "selective"] | None
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...]
    logprob_chunk_tokens: int
    lora: Lora | None
    optim: Optim


@dataclass(frozen=True)
class Margin:
    """Bounds and estimator of AAPO's margin."""

    low: float
    high: float
    estimator: Literal["sampled", "expected"]


@dataclass(frozen=True)
class Clip:
    """How far the importance ratio may go from 1."""

    low: float
    high: float


@dataclass(frozen=True)
class AlgorithmConfig:
    """What ``algorithms.Algorithm`` picks from the papers."""

    name: str
    scale_rewards: bool
    reference: Literal["cached", "online"] | None
    reference_samples: int | None
    reference_store: str | None
    reference_fill_steps: int | None
    margin: Margin | None
    rescale_dead_groups: bool
    loss: Literal["cross_entropy", "ratio_clip"]
    clip: Clip | None
    kl_coefficient: float
    loss_aggregation: Literal["token", "sequence", "fixed_length"]
    updates_per_rollout: int
    importance_weight_cap: float | None


@dataclass(frozen=True)
class Trtllm:
    """An engine of TensorRT-LLM."""

    tensor_parallel_size: int | None
    kv_cache_fraction: float
    refit_bucket_bytes: int


@dataclass(frozen=True)
class Remote:
    """The trainer's side of rollout servers."""

    directory: str
    servers: int
    wait_s: float
    timeout_s: float
    retries: int


@dataclass(frozen=True)
class Server:
    """One rollout server."""

    engine: Literal["megatron", "trtllm"]
    index: int
    host: str
    port: int
    directory: str
    max_request_bytes: int


@dataclass(frozen=True)
class Rollout:
    """How completions are drawn, and how well engine and learner must agree."""

    engine: Literal["megatron", "trtllm", "remote"]
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    max_concurrent_tokens: int
    offload_learner: bool
    async_depth: int
    max_parity_error: float
    max_gen_kl: float
    on_parity_error: Literal["warn", "stop"]
    trtllm: Trtllm
    remote: Remote
    server: Server


@dataclass(frozen=True)
class Data:
    """Prompts and how they are rendered."""

    train: str | tuple[dict[str, Any], ...]
    validation: str | tuple[dict[str, Any], ...]
    prompt_field: str
    answer_field: str
    answer_form: Literal["auto", "boxed"]
    system_prompt: str | None
    chat_template: Literal["auto", "none"]
    prompt_template: str
    max_prompt_tokens: int
    on_long_prompt: Literal["error", "drop"]
    on_bad_line: Literal["error", "skip"]
    on_contamination: Literal["report", "drop", "error"]
    sampling: Literal["uniform", "hard", "medium"]
    shuffle: bool


@dataclass(frozen=True)
class RewardRunnerConfig:
    """The processes that score completions."""

    workers: int
    timeout_s: float
    score_on_failure: float


@dataclass(frozen=True)
class Validation:
    """What is measured on held-out prompts."""

    reward: str
    samples: int
    temperature: float
    top_p: float
    min_new_tokens: int
    max_prompts: int | None
    console_samples: int


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep, how to resume."""

    save_interval: int
    save_interval_s: float | None
    max_time_s: float | None
    async_save: bool
    keep_last: int
    keep_best: Literal["validation/accuracy_greedy", "validation/accuracy_sampled", "reward/mean"] | None
    resume: Literal["auto", "latest_good"]


@dataclass(frozen=True)
class ExpManager:
    """NeMo's exp_manager: logs and loggers."""

    explicit_log_dir: str
    create_tensorboard_logger: bool
    create_wandb_logger: bool
    wandb_logger_kwargs: dict[str, Any]


@dataclass(frozen=True)
class Precision:
    """Numbers and kernels."""

    name: Literal["auto", "fp32", "bf16", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed"]
    num_layers_at_start_in_bf16: int
    num_layers_at_end_in_bf16: int


@dataclass(frozen=True)
class Servers:
    """Rollout servers beside the trainer."""

    nodes: int
    per_node: int
    gpus_per_node: int


@dataclass(frozen=True)
class Container:
    """What pyxis starts the ranks in."""

    image: str | None
    mounts: tuple[str, ...]
    workdir: str | None


@dataclass(frozen=True)
class Cluster:
    """Where the launcher starts ranks, and what it asks Slurm for."""

    kind: Literal["local", "slurm", "interactive"]
    launcher: Literal["sbatch", "nemo_run"]
    account: str | None
    partition: str | None
    qos: str | None
    time: str
    gpus_per_node: int
    cpus_per_task: int | None
    exclusive: bool
    dependency: str | None
    chain: int
    signal_s: int
    max_requeues: int
    fill_jobs: int
    servers: Servers
    container: Container
    python: str | None
    sbatch_args: dict[str, Any]
    srun_args: tuple[str, ...]
    env: dict[str, Any]
    setup: tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """The whole run; field for field what ``conf/train_aapo.yaml`` says."""

    run: Run
    seed: int
    prompts_per_step: int
    group_size: int
    max_tokens_per_microbatch: int
    trainer: Trainer
    model: Model
    algorithm: AlgorithmConfig
    rollout: Rollout
    data: Data
    rewards: tuple[dict[str, Any], ...]
    reward_runner: RewardRunnerConfig
    validation: Validation
    checkpoint: Checkpoint
    export_hf_model: bool
    exp_manager: ExpManager
    precision: Precision
    dry_run: bool
    cluster: Cluster
