"""Settings of completions: how they are generated, what prompts and rewards they have, how they are validated."""

from __future__ import annotations

from typing import Any, Literal

from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import BYTES, COMPLETIONS, COMPLETIONS_OF_STEP, NODES, NUMBER, SECONDS, TOKENS


@section
class Trtllm:
    """An engine of TensorRT-LLM."""

    tensor_parallel_size: int | None = setting(
        "GPUs of one engine; null: TP x PP, all those of a model-parallel group, as it must be in the learner's GPUs",
        decides=False,
        minimum=1,
        sane=NODES,
    )
    kv_cache_fraction: float = setting(
        "its KV cache takes at most this share of the memory that is free when it starts (and max_concurrent_tokens)",
        decides=False,
        above=0,
        below=1,
    )
    refit_bucket_bytes: int = setting(
        "weights are handed over so many bytes at a time, held twice meanwhile", decides=False, minimum=1, sane=BYTES
    )


@section
class Remote:
    """The trainer's side of rollout servers."""

    directory: str = setting(
        "where servers announce themselves and find token and weights; both sides must see it", decides=False, path=True
    )
    servers: int = setting("how many servers are waited for at the start", decides=False, minimum=1, sane=NODES)
    min_servers: int = setting(
        "later so many must be left: a step goes on without those that died", decides=False, minimum=1, sane=NODES
    )
    wait_s: float = setting(
        "seconds that the start waits for servers; later, that a step waits for min_servers",
        decides=False,
        above=0,
        sane=SECONDS,
    )
    timeout_s: float = setting(
        "a server that says nothing for so many seconds is taken for dead", decides=False, above=0, sane=SECONDS
    )
    retries: int = setting("a prompt whose server fails is sent again so often", decides=False, minimum=0, sane=10_000)


@section
class Server:
    """One rollout server."""

    engine: Literal["megatron", "trtllm"] = setting("what it hosts: megatron | trtllm", decides=False)
    tensor_parallel_size: int = setting(
        "ranks that each of its layers is cut over (engine=megatron)", decides=False, minimum=1, sane=NODES
    )
    pipeline_parallel_size: int = setting(
        "stages that its layers are cut into (engine=megatron)", decides=False, minimum=1, sane=NODES
    )
    expert_parallel_size: int = setting(
        "tensor-parallel ranks that share the experts of a layer; divides tensor_parallel_size",
        decides=False,
        minimum=1,
        sane=NODES,
    )
    index: int = setting("which of the servers it is", decides=False, minimum=0, sane=NODES)
    host: str = setting("address to listen on; any but loopback can be reached by others", decides=False)
    port: int = setting("port to listen on; 0: any free one", decides=False, minimum=0, maximum=65_535)
    directory: str = setting("the trainer's rollout.remote.directory", decides=False, path=True)
    max_request_bytes: int = setting("larger requests are refused (413)", decides=False, minimum=1024, sane=BYTES)

    @property
    def ranks(self) -> int:
        """Processes that hold one engine of Megatron's together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@section
class Rollout:
    """How completions are sampled, and how well engine and learner must agree."""

    engine: Literal["megatron", "plain", "trtllm", "remote"] = setting(
        "megatron: in process, on the learner's own weights | plain: the same by whole forward passes, for any model, "
        "slow | trtllm: TensorRT-LLM in the learner's GPUs | remote: on rollout servers",
        decides=True,
    )
    temperature: float = setting(
        "logits are divided by it, in sampling and in training alike", decides=True, above=0, sane=100
    )
    top_p: float = setting(
        "must stay 1 in training: a truncated sampler is another policy than the one trained",
        decides=True,
        above=0,
        maximum=1,
    )
    top_k: int = setting("must stay 0 in training, for the same reason", decides=True, minimum=0, sane=TOKENS)
    max_new_tokens: int = setting("completions are cut here", decides=True, minimum=1, main=True, sane=TOKENS)
    stop_strings: tuple[str, ...] = setting(
        "a completion also ends once its text contains one of these, in validation too", decides=True
    )
    max_concurrent_tokens: int = setting(
        "KV-cache budget of one model-parallel group: sequences at a time x longest sequence; engine=plain: tokens of "
        "a forward pass",
        decides=False,
        minimum=1,
        sane=TOKENS,
    )
    offload_learner: bool = setting(
        "while an engine in the learner's GPUs generates, gradients and optimizer state leave GPU memory", decides=False
    )
    async_depth: int = setting(
        "L: a step trains on completions of the policy L steps before; servers generate them while the learner trains",
        decides=True,
        minimum=0,
        sane=1_000,
    )
    max_lag: int | None = setting(
        "null: in order, see async_depth | N: in flight: servers take new weights between two tokens of a completion, "
        "which is trained on within N steps after the policy that sampled its first one; not deterministic",
        decides="set",
        minimum=1,
        sane=1_000,
    )
    recompute_kv: bool = setting(
        "with max_lag, once a server has new weights: true: keys and values of what is under way are computed anew by "
        "them | false: those of the old ones are gone on with",
        decides="set",
    )
    oversample: float | None = setting(
        "so many times the prompts of a step are generated, and those whose final advantages are all zero left out, as "
        "long as prompts_per_step are left, in the order of the prompts; null: as many as a step needs",
        decides="set",
        minimum=1,
        sane=64,
    )
    bank: Literal["exact", "groups", "off"] = setting(
        "what a killed run takes up again of what it had generated: | exact: each rollout that was whole, to the same "
        "bits | groups: each whole group, to the same tokens; log-probs may differ in their last bits | off: nothing",
        decides=False,
    )
    refit: Literal["files", "delta", "collective", "ipc"] = setting(
        "how servers get new weights: files: whole, in rollout.remote.directory | delta: there, what changed in them | "
        "collective: sent by the trainer's ranks to theirs | ipc: read in the memory of the trainer's ranks, on one "
        "machine; servers and learner take turns with the devices",
        decides=False,
    )
    speculation: bool | None = setting(
        "false: the megatron engine feeds one token of a sequence in a pass | true: guesses go with it where that is "
        "expected to be faster by what a CPU's passes cost, the tokens being the same | null: true on a CPU",
        decides=False,
    )
    replay_routes: bool | None = setting(
        "true: the learner sends each token to the experts that the engine sent it to | null: true for a model with "
        "experts, where the engine is Megatron's",
        decides="set",
    )
    max_parity_error: float = setting(
        "engine against learner on the same tokens: limit of exp(mean |difference of log-probs|)",
        decides=False,
        minimum=1,
        sane=NUMBER,
    )
    max_gen_kl: float = setting(
        "engine against learner on the same tokens: limit of the estimated KL(engine, learner)",
        decides=False,
        minimum=0,
        sane=NUMBER,
    )
    on_parity_error: Literal["warn", "stop"] = setting(
        "over a limit on a later step without lag: warn | stop; before a process's first step it is always an error",
        decides=False,
    )
    keep_groups: int | Literal["all"] = setting(
        "so many groups of each step, chosen by the seed, are kept in rollouts/train_*.jsonl; or all",
        decides=False,
        minimum=0,
        sane=COMPLETIONS_OF_STEP,
    )
    keep_tokens: bool = setting(
        "also their tokens, with log-probs of engine and learner and entropies; one more forward pass over them",
        decides=False,
    )
    keep_bytes: int = setting(
        "kept rollouts take no more; then every second one of the older half is removed",
        decides=False,
        minimum=0,
        sane=BYTES,
    )
    replay: str | None = setting(
        "train on all that this run kept (keep_groups=all, keep_tokens=true), without an engine; train.py --replay RUN",
        decides="set",
        path=True,
    )
    trtllm: Trtllm
    remote: Remote
    server: Server


@section
class Data:
    """Prompts and how they are rendered."""

    train: str | tuple[dict[str, Any], ...] = setting(
        "JSONL, JSON, csv, Parquet or Arrow file, saved data set, hub name, reasoning_gym:TASK; or a list [{path: ..., "
        "weight: ...}, ...]",
        decides=True,
        main=True,
        path=True,
    )
    validation: str | tuple[dict[str, Any], ...] = setting(
        "held-out prompts, in the same forms", decides=True, main=True, path=True
    )
    prompt_field: str = setting(
        "the field with the question, or with chat messages; dots lead inside: prompt.0.content", decides=True
    )
    answer_field: str = setting('the field with the gold answer (GSM8K\'s "#### N" is understood)', decides=True)
    answer_form: Literal["auto", "boxed"] = setting(
        "auto: the answer itself | boxed: a worked solution whose last \\boxed{} holds it", decides=True
    )
    system_prompt: str | None = setting(
        "put before each question by the chat template, or where prompt_template has {system_prompt}", decides=True
    )
    chat_template: Literal["auto", "none"] = setting(
        "auto: the tokenizer's, if it has one | none: plain text", decides=True
    )
    template_arguments: dict[str, Any] | None = setting(
        "what the chat template reads besides the messages: {enable_thinking: false}", decides="set"
    )
    date: str | None = setting(
        "YYYY-MM-DD, for chat templates that write the date; null: the day of the run's first start, or of its store",
        decides="set",
    )
    prompt_template: str = setting(
        "what is said around the question; as plain text it may hold {system_prompt}, too", decides=True
    )
    max_prompt_tokens: int = setting("longest prompt in tokens", decides=True, minimum=1, sane=TOKENS)
    on_long_prompt: Literal["error", "drop"] = setting("a longer prompt: error | drop (and count)", decides=True)
    on_bad_line: Literal["error", "skip"] = setting("a line that can't be used: error | skip (and count)", decides=True)
    on_contamination: Literal["report", "drop", "error"] = setting(
        "a training prompt that is among the held-out ones, by normalised text: report | drop (and count) | error",
        decides=True,
    )
    sampling: Literal["uniform", "hard", "medium"] = setting(
        "uniform | hard | medium: after the first epoch by each prompt's running accuracy, as GPG", decides=True
    )
    shuffle: bool = setting("a new order each epoch, decided by the seed", decides=True)


@section
class RewardRunnerConfig:
    """The processes that score completions."""

    workers: int = setting(
        "processes that score, on each model-parallel group; 0: in the trainer itself",
        decides=False,
        minimum=0,
        sane=1024,
    )
    timeout_s: float = setting(
        "seconds for one completion; then its worker is killed", decides=False, above=0, sane=SECONDS
    )


@section
class Validation:
    """What is measured on held-out prompts."""

    reward: str = setting("which of the rewards counts as right (at 1) or wrong", decides=True)
    samples: int = setting(
        "sampled completions per prompt, besides the greedy one", decides=True, minimum=0, sane=COMPLETIONS
    )
    temperature: float = setting("temperature of the sampled ones", decides=True, minimum=0, sane=100)
    top_p: float = setting("nucleus truncation of the sampled ones", decides=True, above=0, maximum=1)
    min_new_tokens: int = setting(
        "no end of sequence before so many tokens; training has none, as it would sample from another distribution",
        decides=True,
        minimum=0,
        sane=TOKENS,
    )
    max_prompts: int | None = setting("validate on the first so many prompts only", decides=True, minimum=1, sane=10**9)
    console_samples: int = setting(
        "completions shown on the console at each validation", decides=False, minimum=0, sane=10_000
    )
