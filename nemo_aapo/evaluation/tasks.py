"""A benchmark as input of the engine: problems, rendered prompts, and how completions are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_aapo.config import EvaluationConfig
from nemo_aapo.data.tokenizer import render_prompts
from nemo_aapo.errors import DataError
from nemo_aapo.evaluation.benchmarks import Problem, load_problems
from nemo_aapo.evaluation.prompts import template_text
from nemo_aapo.types import Prompt, SamplingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ANSWERS = 3
"""Number of unusable gold answers that a message names."""


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark as input of the engine; the same on all ranks."""

    name: str
    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]
    """One prompt for each problem, in their order."""
    unusable: frozenset[str] = frozenset()
    """Ids of the problems whose gold answer the reward can't work with: whatever is answered is wrong."""


def load_task(
    config: EvaluationConfig,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    check_answer: Callable[[str], None],
    log: Callable[[str], None],
) -> Task:
    """Read, check, render and tokenise a benchmark.

    Args:
        check_answer: raises ValueError for a gold answer that the reward can't work with.
        log: called with remarks for the person who runs the evaluation.

    Raises:
        DataError: rows, gold answers or prompts that can't be used.
    """
    problems, note = load_problems(name, config.sources[name], config.fields)
    problems = problems[: config.max_problems]
    log(f"{name}: {len(problems)} problems from {problems[0].source.rpartition(':')[0]}{note}")
    unusable = _check_answers(config, name, problems, check_answer, log)
    texts, ids = render_prompts(
        tokenizer,
        [problem.question for problem in problems],
        system_prompt=config.system_prompt,
        chat_template=config.chat_template,
        prompt_template=template_text(config.prompt_template),
        template_arguments=config.template_arguments,
        date=config.date,
    )
    long = [p.source for p, tokens in zip(problems, ids, strict=True) if len(tokens) > config.max_prompt_tokens]
    if long:
        raise DataError(
            f"{name}: {len(long)} prompt(s) have more than max_prompt_tokens={config.max_prompt_tokens} tokens, such "
            f"as {long[0]} (the longest: {max(map(len, ids))}). Raise it: leaving them out would be another benchmark"
        )
    prompts = tuple(
        Prompt(problem.id, tokens, text, problem.answer, problem.source)
        for problem, text, tokens in zip(problems, texts, ids, strict=True)
    )
    return Task(name, problems, prompts, unusable)


def _check_answers(
    config: EvaluationConfig,
    name: str,
    problems: Sequence[Problem],
    check_answer: Callable[[str], None],
    log: Callable[[str], None],
) -> frozenset[str]:
    """Refuse gold answers that the reward can't work with, or warn of them, as ``on_bad_answer`` has it; their ids."""
    bad: dict[str, str] = {}
    for problem in problems:
        try:
            check_answer(problem.answer)
        except ValueError as error:
            bad[problem.id] = f"{problem.source}: the gold answer {problem.answer!r} can't be verified: {error}"
    if not bad:
        return frozenset()
    shown = "\n  ".join(list(bad.values())[:SHOWN_ANSWERS])
    if config.on_bad_answer == "error":
        raise DataError(
            f"{name}: {len(bad)} of {len(problems)} gold answers can't be used:\n  {shown}\n"
            "Mend them, or count their problems as wrong, as other harnesses do: on_bad_answer=wrong"
        )
    log(f"WARNING: {name}: {len(bad)} of {len(problems)} problems count as wrong whatever is answered:\n  {shown}")
    return frozenset(bad)


def sampling_of(config: EvaluationConfig, end_tokens: tuple[int, ...]) -> SamplingSpec:
    """How completions are sampled."""
    sampling = config.sampling
    return SamplingSpec(
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=end_tokens,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        stop_strings=sampling.stop_strings,
    )
