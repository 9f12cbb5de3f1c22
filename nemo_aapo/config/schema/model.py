"""Settings of the model, its layout over the ranks and its optimizer."""

from __future__ import annotations

from typing import Literal

from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import NODES, NUMBER, STEPS, TOKENS


@section
class Sched:
    """The learning rate over the steps."""

    name: Literal["constant", "cosine"] = setting("constant | cosine, after a linear warm-up", decides=True)
    warmup_steps: int = setting("steps from 0 to lr", decides=True, minimum=0, sane=STEPS)
    min_lr: float = setting("where cosine ends, at trainer.max_steps", decides=True, minimum=0, sane=NUMBER)


@section
class Optim:
    """Adam, as mcore builds it."""

    lr: float = setting("peak learning rate of Adam", decides=True, above=0, main=True, sane=NUMBER)
    betas: tuple[float, float] = setting("Adam's moment decays", decides=True, minimum=0, below=1)
    eps: float = setting("Adam's denominator offset", decides=True, above=0, maximum=1)
    weight_decay: float = setting("decoupled weight decay, on matrices only", decides=True, minimum=0, sane=1e6)
    clip_grad: float = setting("largest global gradient norm", decides=True, above=0, sane=NUMBER)
    use_distributed_optimizer: bool | None = setting(
        "shard the optimizer state over the data-parallel ranks; null: on a GPU", decides=True
    )
    overlap_grad_reduce: bool = setting("reduce gradients while the backward pass goes on", decides=False)
    overlap_param_gather: bool = setting(
        "gather updated weights while the next forward pass goes on; for updates_per_rollout > 1", decides=False
    )
    cpu_offload_fraction: float = setting(
        "keep and update this share of the optimizer state in host memory; GPU only", decides=True, minimum=0, maximum=1
    )
    sched: Sched


@section
class Lora:
    """Low-rank adapters that are trained in place of the weights."""

    rank: int = setting(
        "rank of the adapters; divisible by the tensor-parallel size", decides=True, minimum=1, sane=65_536
    )
    alpha: int = setting("the adapters' product is scaled by alpha / rank", decides=True, minimum=1, sane=1_000_000)
    target_modules: tuple[str, ...] = setting(
        "layers with adapters: some of linear_qkv, linear_proj, linear_fc1, linear_fc2", decides=True
    )


@section
class Model:
    """The model, its layout over the ranks, its optimizer."""

    path: str = setting(
        "Hugging Face model directory: config.json, *.safetensors, tokenizer", decides=True, main=True, path=True
    )
    trust_remote_code: bool = setting("run Python code that comes with the model's tokenizer", decides=True)
    tensor_model_parallel_size: int = setting(
        "TP: each layer cut over so many ranks; divides heads and key-value groups",
        decides=False,
        minimum=1,
        main=True,
        sane=NODES,
    )
    pipeline_model_parallel_size: int = setting(
        "PP: layers distributed over so many stages; divides the number of layers",
        decides=False,
        minimum=1,
        main=True,
        sane=NODES,
    )
    context_parallel_size: int = setting(
        "CP: each sequence of a training pass cut over so many ranks; needs sequence packing",
        decides=False,
        minimum=1,
        sane=NODES,
    )
    expert_model_parallel_size: int = setting(
        "EP: experts of a model that has some distributed over so many ranks; divides their number, and TP x CP x DP",
        decides=False,
        minimum=1,
        sane=NODES,
    )
    sequence_parallel: bool = setting(
        "also cut activations between the tensor-parallel regions; needs TP > 1", decides=False, main=True
    )
    sequence_packing: bool | None = setting(
        "true: micro-batches are one row of sequences end to end (thd) | false: padded rows | null: true on "
        "a GPU, or with share_prompts",
        decides=False,
    )
    share_prompts: bool | None = setting(
        "true: a group's completions stand behind one copy of their prompt, which is computed once | null: "
        "true on a CPU, unless sequence_packing=false; false on a GPU, where true was never run and is tried out at "
        "the start",
        decides=False,
    )
    recompute_granularity: Literal["full", "selective"] | None = setting(
        "recompute activations in the backward pass to save memory: full: all, layer by layer | selective: "
        "recompute_modules",
        decides=False,
    )
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] = setting(
        "selective: of core_attn, mlp, moe (of a model with experts, in place of mlp)", decides=False
    )
    logprob_chunk_tokens: int = setting(
        "memory bound of log-probs and loss: so many tokens' logits exist at one time",
        decides=False,
        minimum=1,
        sane=TOKENS,
    )
    lora: Lora | None = setting(
        "train adapters: {rank: 16, alpha: 32, target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]}",
        decides=True,
    )
    optim: Optim
