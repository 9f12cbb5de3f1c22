"""The settings of an evaluation: field for field those of ``conf/evaluate.yaml`` (a test holds the two together).

Names that an evaluation shares with training mean the same.
"""

from __future__ import annotations

from typing import Any, Literal

from nemo_aapo.config.schema.facts import section, setting
from nemo_aapo.config.schema.limits import COMPLETIONS, NODES, RANKS_OF_NODE, SECONDS, SEED, TOKENS
from nemo_aapo.config.schema.rollout import Remote


@section
class EvaluationRun:
    """Name and place of the evaluation."""

    name: str = setting("names the evaluation; part of the default directory", decides=False, main=True)
    dir: str = setting(
        "what it leaves: completions, results, tables; the same command goes on from there",
        decides=False,
        main=True,
        path=True,
    )


@section
class EvaluatedModel:
    """What is measured, and its layout over the ranks."""

    path: str = setting(
        "Hugging Face directory, run directory (its newest checkpoint), or one of its checkpoints",
        decides=True,
        main=True,
        path=True,
    )
    base: str | None = setting(
        "Megatron checkpoints: the Hugging Face directory training began with; null: by the run's config.yaml",
        decides=True,
        main=True,
        path=True,
    )
    trust_remote_code: bool = setting("run Python code that comes with the model's tokenizer", decides=False)
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
    expert_model_parallel_size: int = setting(
        "EP: experts of a model that has some distributed over so many ranks; divides their number, and TP x DP",
        decides=False,
        minimum=1,
        sane=NODES,
    )


@section
class EvaluationRanks:
    """Ranks and deadlines."""

    num_nodes: int = setting(
        "machines; under torchrun what it started, else 1", decides=False, minimum=1, main=True, sane=NODES
    )
    devices: int = setting(
        "ranks on each machine, likewise; this script starts them where torchrun did not",
        decides=False,
        minimum=1,
        main=True,
        sane=RANKS_OF_NODE,
    )
    distributed_timeout_s: float = setting(
        "a rank that waits longer for another one ends the evaluation with an error",
        decides=False,
        above=0,
        sane=SECONDS,
    )
    fault_timeout_s: float = setting(
        "once a rank has failed, the others end within this or are killed", decides=False, above=0, sane=SECONDS
    )


@section
class EvaluationFields:
    """Columns of a source of one's own."""

    question: str = setting("column of the question", decides=False)
    answer: str = setting('column of the gold answer (GSM8K\'s "#### N" is understood)', decides=False)
    level: str | None = setting("column of the level, which makes a table by level; null: none", decides=False)
    subject: str | None = setting("column of the subject, which makes a table by subject; null: none", decides=False)


@section
class Sampling:
    """How completions are sampled."""

    temperature: float = setting("logits are divided by it; 0: greedy", decides=True, minimum=0, main=True, sane=100)
    top_p: float = setting("nucleus truncation", decides=True, above=0, maximum=1, main=True)
    max_new_tokens: int = setting("completions are cut here", decides=True, minimum=1, main=True, sane=TOKENS)
    stop_strings: tuple[str, ...] = setting("a completion also ends once its text contains one of these", decides=True)


@section
class EvaluationRollout:
    """Where completions are sampled."""

    engine: Literal["megatron", "plain", "remote"] = setting(
        "megatron: in process | plain: by whole forward passes, for any model, slow | remote: on rollout servers, "
        "which are handed the weights",
        decides=False,
        main=True,
    )
    remote: Remote


@section
class EvaluationRunner:
    """The processes that judge completions."""

    workers: int = setting(
        "processes that judge, on each model-parallel group; 0: in the process itself",
        decides=False,
        minimum=0,
        sane=1024,
    )
    timeout_s: float = setting(
        "seconds for one completion; then its worker is killed, and it is in no figure",
        decides=False,
        above=0,
        sane=SECONDS,
    )


@section
class EvaluationPrecision:
    """Numbers and kernels: training's names, without FP8, which an engine does not decode in."""

    name: Literal["auto", "fp32", "bf16"] = setting("auto: bf16 on a GPU, fp32 on a CPU | fp32 | bf16", decides=True)


@section
class EvaluationConfig:
    """A whole evaluation."""

    run: EvaluationRun
    seed: int = setting(
        "seed of sampling; the same seed gives the same completions, whatever the layout",
        decides=True,
        minimum=0,
        main=True,
        sane=SEED,
    )
    model: EvaluatedModel
    benchmarks: tuple[str, ...] = setting(
        "which of the sources are measured: math500, aime24, amc23, minerva, olympiadbench are the paper's",
        decides=False,
        main=True,
    )
    sources: dict[str, Any] = setting(
        "where the rows are: a file, or a data set of the hub; +sources.NAME=FILE adds your own", decides=False
    )
    fields: EvaluationFields
    prompt_template: str = setting(
        "open_rs (the paper's) | simplerl_abel | simplerl_qwen | question | a text with {question} in it",
        decides=True,
        main=True,
    )
    system_prompt: str | None = setting("put before each question by the chat template", decides=True)
    chat_template: Literal["auto", "none"] = setting(
        "auto: the tokenizer's, if it has one | none: the prompt as it stands", decides=True, main=True
    )
    template_arguments: dict[str, Any] | None = setting(
        "what the chat template reads besides the messages: {enable_thinking: false}", decides=True
    )
    date: str | None = setting(
        "YYYY-MM-DD, for chat templates that write the date; null: that of the run that is measured, or of the first "
        "start",
        decides=True,
    )
    max_prompt_tokens: int = setting("longest prompt in tokens", decides=False, minimum=1, sane=TOKENS)
    max_problems: int | None = setting(
        "measure on the first so many problems of each benchmark only", decides=False, minimum=1, sane=10**9
    )
    on_bad_answer: Literal["error", "wrong"] = setting(
        "a gold answer that the reward can't work with: error | wrong (counted, and never right)", decides=False
    )
    samples: int = setting(
        "k: completions of each problem; more can be added later", decides=False, minimum=1, main=True, sane=COMPLETIONS
    )
    sampling: Sampling
    rollout: EvaluationRollout
    rewards: tuple[dict[str, Any], ...] = setting("the one that tells right (1) from wrong", decides=True, path=True)
    reward_runner: EvaluationRunner
    problems_per_batch: int = setting(
        "completions are kept after so many problems; an interruption loses those of one batch",
        decides=False,
        minimum=1,
        main=True,
        sane=1_000_000,
    )
    max_concurrent_tokens: int = setting(
        "KV-cache budget of one model-parallel group: sequences at a time x longest sequence",
        decides=False,
        minimum=1,
        sane=TOKENS,
    )
    trainer: EvaluationRanks
    precision: EvaluationPrecision
