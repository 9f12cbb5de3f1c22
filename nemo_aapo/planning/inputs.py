"""The inputs of a plan: settings of the configuration that it depends on, and what the question adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_aapo.config import Config, kind_of
from nemo_aapo.config.schema import Lora
from nemo_aapo.planning.hardware import Hardware
from nemo_aapo.planning.models import PlannedModel
from nemo_aapo.planning.simulation.lengths import Lengths

Kind = Literal["local", "transformer_engine"]
Numbers = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Question:
    """The part of a plan's inputs that is not in the configuration."""

    model: PlannedModel
    hardware: Hardware
    mean_prompt_tokens: float
    mean_completion_tokens: float
    dataset_prompts: int | None
    """Number of prompts in the training data; None: unknown, as if no prompt came twice."""
    lengths: Lengths | None = None
    """Lengths of completions, to simulate rollouts with; None: no simulation is asked for."""
    gpus: int | None = None
    """GPUs that a simulation divides between trainer and servers; None: those that are configured."""


@dataclass(frozen=True)
class Layout:
    """How the ranks are divided: tensor x pipeline x context x data parallel, and experts over those of a stage."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    ranks_per_node: int = 8
    context: int = 1
    """Ranks that cut every sequence among them. For rollouts each is a data-parallel rank of its own."""
    expert: int = 1
    """Ranks of a pipeline stage that hold all experts together. Experts themselves are not cut."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.copies

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same part of the model, experts left out."""
        return self.context * self.data

    @property
    def expert_copies(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.tensor * self.copies // self.expert

    @property
    def sequence_cut(self) -> int:
        """Number of parts that sequences are cut into where sequence parallelism cuts them."""
        return self.tensor if self.sequence_parallel else 1

    def __str__(self) -> str:
        context = f" x CP {self.context}" if self.context > 1 else ""
        expert = f", EP {self.expert}" if self.expert > 1 else ""
        return f"TP {self.tensor} x PP {self.pipeline}{context} x DP {self.data}{expert}"


@dataclass(frozen=True)
class Learner:
    """The settings that decide the learner's memory and work."""

    kind: Kind
    """Whose layers run: mcore's local ones or TransformerEngine's."""
    numbers: Numbers
    """The precision that it computes in."""
    recompute: Literal["selective", "full"] | None
    recompute_modules: tuple[str, ...]
    """The modules that ``selective`` recomputes."""
    tokens_per_microbatch: int
    logprob_chunk_tokens: int
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    optimizer_on_host: float
    """Fraction of the optimizer's state that is in host memory."""
    lora: Lora | None
    """Adapters that are trained in place of the weights; None: the weights are trained."""


@dataclass(frozen=True)
class Engine:
    """The rollout engine or engines."""

    kind: Literal["megatron", "trtllm", "remote"]
    engines: int
    """Number of engines."""
    gpus: int
    """GPUs of one engine."""
    max_concurrent_tokens: int
    """KV-cache budget of one engine."""
    kv_cache_fraction: float
    refit_bucket_bytes: int
    offload_learner: bool


@dataclass(frozen=True)
class Work:
    """The work of a step."""

    steps: int
    prompts: int
    group_size: int
    max_sequence_tokens: int
    prompt_tokens: float
    """Mean length of a prompt."""
    completion_tokens: float
    """Mean length of a completion."""
    updates: int
    scoring_passes: int
    """Number of forward passes of the learner over the whole batch, besides those of training."""
    reference: Literal["cached", "online"] | None
    reference_samples: int
    keeps_reference: bool
    """Reference weights are kept in host memory."""
    scores_reference: bool
    """Reference weights are swapped in to score the batch."""
    draws_from_reference: bool
    """Reference weights are swapped in to generate completions, after the first update."""
    dataset_prompts: int | None

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> float:
        """Prompt and completion tokens that the learner sees in a step."""
        return self.completions * (self.prompt_tokens + self.completion_tokens)


@dataclass(frozen=True)
class Inputs:
    """All that a plan is computed from."""

    model: PlannedModel
    hardware: Hardware
    layout: Layout
    learner: Learner
    engine: Engine
    work: Work


def plan_inputs(config: Config, question: Question) -> Inputs:
    """The inputs of a plan.

    Args:
        config: without values that are left to the machine, and checked by ``config.derive`` for the model.
    """
    return Inputs(
        question.model, question.hardware, layout_of(config), _learner(config), _engine(config), _work(config, question)
    )


def layout_of(config: Config) -> Layout:
    """The configured layout; ranks beyond tensor x pipeline x context are data-parallel."""
    model, ranks = config.model, config.trainer.num_nodes * config.trainer.devices
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=model.context_parallel_size,
        expert=model.expert_model_parallel_size,
        data=ranks // (tensor * pipeline * model.context_parallel_size),
        sequence_parallel=model.sequence_parallel,
        ranks_per_node=config.trainer.devices,
    )


def _learner(config: Config) -> Learner:
    model, precision = config.model, kind_of(config)
    return Learner(
        kind="transformer_engine",  # on a GPU, whatever the precision (mcore/precision.py)
        numbers="fp8" if precision.fp8 else "bf16" if precision.bf16 else "fp32",
        recompute=model.recompute_granularity,
        recompute_modules=model.recompute_modules,
        tokens_per_microbatch=config.max_tokens_per_microbatch,
        logprob_chunk_tokens=model.logprob_chunk_tokens,
        distributed_optimizer=bool(model.optim.use_distributed_optimizer),
        overlap_grad_reduce=model.optim.overlap_grad_reduce,
        overlap_param_gather=model.optim.overlap_param_gather,
        optimizer_on_host=model.optim.cpu_offload_fraction,
        lora=model.lora,
    )


def _engine(config: Config) -> Engine:
    rollout, layout = config.rollout, layout_of(config)
    trtllm = rollout.trtllm
    engines, gpus = layout.copies, layout.tensor * layout.pipeline
    if rollout.engine == "remote":
        engines, gpus = rollout.remote.servers, rollout.server.tensor_parallel_size  # its stages take turns
        if rollout.server.engine == "trtllm":
            gpus = trtllm.tensor_parallel_size or layout.tensor * layout.pipeline
    kind = "megatron" if rollout.engine == "plain" else rollout.engine  # a plan of it is refused (prepare/plan.py)
    if rollout.engine == "remote" and rollout.refit == "ipc":
        kind = "trtllm"  # on the learner's GPUs, as in its processes; of Megatron's a plan is refused
    return Engine(
        kind=kind,
        engines=engines,
        gpus=gpus,
        max_concurrent_tokens=rollout.max_concurrent_tokens,
        kv_cache_fraction=trtllm.kv_cache_fraction,
        refit_bucket_bytes=trtllm.refit_bucket_bytes,
        offload_learner=rollout.offload_learner,
    )


def _work(config: Config, question: Question) -> Work:
    algorithm = config.algorithm
    old = algorithm.updates_per_rollout > 1 and algorithm.needs_old_logprobs
    kl = algorithm.needs_reference_logprobs
    return Work(
        steps=config.trainer.max_steps,
        prompts=config.prompts_per_step,
        group_size=config.group_size,
        max_sequence_tokens=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        prompt_tokens=question.mean_prompt_tokens,
        completion_tokens=question.mean_completion_tokens,
        updates=algorithm.updates_per_rollout,
        scoring_passes=int(old) + int(kl),
        reference=algorithm.reference,
        reference_samples=algorithm.reference_samples or 0,
        keeps_reference=algorithm.compares_with_reference,
        scores_reference=kl,
        draws_from_reference=algorithm.reference == "online" or algorithm.reference_fill_steps is not None,
        dataset_prompts=question.dataset_prompts,
    )
