"""A whole evaluation: load, generate and judge batch by batch, keep every completion, sum up. Collective."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import yaml
from tqdm import tqdm

from nemo_aapo.config import Config, EvaluationConfig
from nemo_aapo.conversion.source import lora_of
from nemo_aapo.data.tokenizer import load_tokenizer, text_decoder
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree, on_first_rank
from nemo_aapo.engines.base import RolloutEngine
from nemo_aapo.evaluation import report
from nemo_aapo.evaluation.benchmarks import Problem
from nemo_aapo.evaluation.measure import measure
from nemo_aapo.evaluation.records import Record, Records, claim_identity
from nemo_aapo.evaluation.settings import reward_name
from nemo_aapo.evaluation.tasks import Task, load_task, sampling_of
from nemo_aapo.evaluation.votes import answer_of
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.groups import destroy_model_parallel
from nemo_aapo.models import directory as model_dir
from nemo_aapo.prepare.evaluation import EvaluationJob
from nemo_aapo.rollout.collector import ChecksAnswers, Collector, RewardScorer
from nemo_aapo.run.directory import lock_directory
from nemo_aapo.run.stop import StopSignal
from nemo_aapo.seeds import stream_seed
from nemo_aapo.training.build import build_scorer, initialize
from nemo_aapo.types import Group, SamplingSpec
from nemo_aapo.utils.files import FINISHED, to_json, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULTS, TABLES = "results.json", "tables.md"
LINE_EVERY_S = 30.0
"""Without a terminal, the progress bar is a line at most this often."""


def evaluate(job: EvaluationJob) -> int:
    """Measure everything that a job asks for, going on where an earlier call was interrupted.

    Returns:
        0: done, or ended by a signal after the batch at hand.

    Raises:
        ConfigError, DataError, RunError: on all ranks.
    """
    config, settings, source = job.config, job.settings, job.source
    directory = Path(config.run.dir)
    initialize(settings)
    first = parallel.rank() == 0
    try:
        with (
            contextlib.ExitStack() as stack,
            StopSignal(directory, speak=first, ending="keeping this batch, then stopping") as stop,
            parallel.lost_ranks_reported(lambda: "the evaluation"),
        ):
            agree(lambda: stack.enter_context(_claimed(directory)) if first else None)
            scorer = build_scorer([(job.reward, 1.0)], settings.reward_runner, stack)
            tokenizer = load_tokenizer(str(source.base), trust_remote_code=config.model.trust_remote_code)
            tasks = _load_tasks(config, tokenizer, scorer)
            decode = text_decoder(tokenizer)
            engine, weights = _build_engine(job, decode)
            identity = _identity(config, settings, weights)
            agree(lambda: _begin(directory, dict(job.tree), identity) if first else None)
            collector = Collector(engine, scorer, decode)
            sampling = sampling_of(config, source.base, tokenizer)
            for task in tasks:
                if not _measure(config, task, collector, sampling, stop):
                    _say(f"{directory}: stopped; the same command goes on from there")
                    return 0
            agree(lambda: _finish(config, tasks, identity) if first else None)
        return 0
    finally:
        destroy_model_parallel()


# ---------------------------------------------------------------- loading


def _load_tasks(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, scorer: RewardScorer | None
) -> list[Task]:
    """Rank 0 reads and checks all data; all ranks get the same, or the same error."""

    def load() -> list[Task]:
        assert isinstance(scorer, ChecksAnswers), "rank 0 has a RewardRunner"
        return [load_task(config, name, tokenizer, scorer.check_answer, _say) for name in config.benchmarks]

    return on_first_rank(load)


def _build_engine(job: EvaluationJob, decode: Callable[[np.ndarray], str]) -> tuple[RolloutEngine, str]:
    """The engine with the weights that are measured, and what tells these from others. Collective."""
    from nemo_aapo.conversion import megatron_model
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    source, settings = job.source, job.settings
    weight_map, module = megatron_model.build(source.base, precision.dtype(settings), lora_of(source))
    _say(f"loading {source.path}")
    if source.kind == "hf":
        weight_map.load(module)
        digest = on_first_rank(lambda: model_dir.digest(str(source.base)))
    else:
        content = megatron_model.load_checkpoint(source, module, _say)
        sums = repr(sorted((name, record.sha256) for name, record in content.files.items()))
        digest = f"{hashlib.sha256(sums.encode()).hexdigest()[:16]} (step {content.step})"
    budget = settings.rollout.max_concurrent_tokens
    return MegatronEngine(module, job.shape.vocab_size, budget, decode=decode), digest


def _identity(config: EvaluationConfig, settings: Config, weights: str) -> dict[str, Any]:
    """What decides the completions of a problem and their verdicts. Which problems, and how many samples, may grow."""
    return {
        "model": weights,
        "seed": config.seed,
        "prompt_template": config.prompt_template,
        "system_prompt": config.system_prompt,
        "chat_template": config.chat_template,
        "sampling": asdict(config.sampling),
        "reward": config.rewards[0],
        "precision": settings.precision.name,
    }


# ---------------------------------------------------------------- measuring


def _measure(
    config: EvaluationConfig, task: Task, collector: Collector, sampling: SamplingSpec, stop: StopSignal
) -> bool:
    """Generate, judge and keep what is missing of a benchmark; False if a signal ended it early. Collective."""
    records, reward = Records(Path(config.run.dir), task.name), reward_name(config)

    def missing() -> list[list[int]]:
        kept = records.read()
        records.mend(kept.values())
        return [[k for k in range(config.samples) if (p.id, k) not in kept] for p in task.problems]

    samples = on_first_rank(missing)
    wanted = [i for i, row in enumerate(samples) if row]
    total = len(task.problems) * config.samples
    with _bar(task.name, total, total - sum(map(len, samples))) as bar:
        for start in range(0, len(wanted), config.problems_per_batch):
            if parallel.any_rank(stop.requested)[0]:
                return False
            batch = wanted[start : start + config.problems_per_batch]
            seeds = [
                [stream_seed(config.seed, "evaluation", task.problems[i].id, k) for k in samples[i]] for i in batch
            ]
            prompts = [task.prompts[i] for i in batch]
            groups = measure(collector, prompts, sampling, seeds, reward).groups
            problems = {task.problems[i].id: (task.problems[i], samples[i]) for i in batch}
            mine = [row for group in groups for row in _records(group, *problems[group.prompt.id], reward)]
            everyone = [row for part in parallel.gather_data_parallel(mine) for row in part]
            agree(functools.partial(_keep, records, everyone))
            bar.update(len(everyone))
    return True


def _keep(records: Records, rows: Sequence[Record]) -> None:
    if parallel.rank() == 0:
        records.append(rows)


def _records(group: Group, problem: Problem, samples: Sequence[int], reward: str) -> list[Record]:
    """A problem's completions as they are kept; none where the texts are not on this rank."""
    return [
        Record(
            problem=problem.id,
            sample=samples[i],
            correct=bool(right),
            failed=bool(group.failed[i]),
            voted=answer_of(group.texts[i]),
            tokens=len(group.completions[i].token_ids),
            finish_reason=group.completions[i].finish_reason,
            level=problem.level,
            subject=problem.subject,
            gold=problem.answer,
            prompt=group.prompt.text,
            completion=group.texts[i],
            source=problem.source,
        )
        for i, right in enumerate(group.right(reward) if group.texts else ())
    ]


# ---------------------------------------------------------------- files and screen


def _claimed(directory: Path) -> TextIO:
    """The directory, made and locked: one process at a time writes there."""
    directory.mkdir(parents=True, exist_ok=True)
    return lock_directory(directory, str(directory))


def _begin(directory: Path, tree: dict[str, Any], identity: dict[str, Any]) -> None:
    claim_identity(directory, identity)
    write_atomic(directory / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    (directory / FINISHED).unlink(missing_ok=True)


def _finish(config: EvaluationConfig, tasks: Sequence[Task], identity: dict[str, Any]) -> None:
    """Sum up all that is asked for, and say it."""
    directory = Path(config.run.dir)
    results = {}
    for task in tasks:
        kept = {key: record for key, record in Records(directory, task.name).read().items() if key[1] < config.samples}
        results[task.name] = report.figures(report.judged(kept, [problem.id for problem in task.problems]))
    mean = report.macro_average(results)
    whole = {**identity, "benchmarks": results, "mean": mean and {"value": mean.value, "stderr": mean.stderr}}
    write_atomic(directory / RESULTS, to_json(whole) + "\n")
    tables = report.tables(results)
    write_atomic(directory / TABLES, tables)
    write_atomic(directory / FINISHED, to_json({"benchmarks": list(results)}) + "\n")
    print(f"\n{tables}\ncompletions   {directory / 'completions'}\nfigures       {directory / RESULTS}", flush=True)


def _bar(name: str, total: int, done: int) -> Any:
    often = 0.1 if sys.stdout.isatty() else LINE_EVERY_S
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit="completion",
        file=sys.stdout,
        mininterval=often,
        disable=parallel.rank() != 0,
    )


def _say(text: str) -> None:
    if parallel.rank() == 0:
        print(text, flush=True)
