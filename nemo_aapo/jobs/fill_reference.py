"""Filling the store of reference rewards without training: all at once, or in shards that are merged afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nemo_aapo.config import Config
from nemo_aapo.data.loading import build_sampler
from nemo_aapo.data.sampler import PromptSampler
from nemo_aapo.data.tokenizer import load_text
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_first_rank
from nemo_aapo.distributed.lost_ranks import lost_ranks_reported
from nemo_aapo.errors import ConfigError, Interrupted
from nemo_aapo.mcore.groups import destroy_model_parallel
from nemo_aapo.prepare.job import Job
from nemo_aapo.reference_store.key import StoreKey
from nemo_aapo.reference_store.shards import Shard, merge_shards, shard_files
from nemo_aapo.reference_store.store import RewardStore, is_complete
from nemo_aapo.run.stop import StopSignal
from nemo_aapo.training.build import (
    build_rollouts,
    build_scorer,
    initialize,
    sampling_of,
    with_first_ranks_date,
)
from nemo_aapo.training.build_reference import reference_key
from nemo_aapo.training.read_data import read_data
from nemo_aapo.types import Prompt

INCOMPLETE = 1
"""Exit code where rewards are missing."""
LINE_EVERY_S = 30.0
"""Without a terminal, the progress bar is a line at most this often."""


def fill(job: Job, shard: Shard | None = None) -> int:
    """Sample and store the reference rewards of all prompts that a run of this job takes. Collective.

    It goes on where an earlier call was interrupted.

    Args:
        shard: fill only this part, into a file of its own; what the store itself has already is left out.

    Returns:
        0: done, or ended by a signal or ``checkpoint.max_time_s``; what was scored by then is stored.
    """
    store, samples = _store(job.config)
    own = str(shard.path(store)) if shard else store
    job = _with_store(job, own)
    initialize(job.config)
    speaks = parallel.rank() == 0
    try:
        job = with_first_ranks_date(job)
        with (
            StopSignal(
                limit_s=job.config.checkpoint.max_time_s, speak=speaks, ending="storing what is scored, then stopping"
            ) as stop,
            contextlib.ExitStack() as stack,
            lost_ranks_reported(lambda: "the filling of the reference store"),
            _Screen(speaks) as screen,
        ):
            pipeline = build_rollouts(job, reporter=screen, stack=stack, new_store_key=True).pipeline
            reference = pipeline.reference
            assert reference is not None, "algorithm.reference=cached was checked"
            prompts = needed_prompts(pipeline.data, pipeline.sampler, job.config.trainer.max_steps)
            if shard:
                prompts = _not_in(store, reference.key, shard.select(prompts), samples)
            complete = reference.prepare(prompts, pipeline.reference_served, screen.progress, lambda: stop.requested)
            what = f"{len(prompts)} prompts x {samples} reference rewards"
            if not complete:
                raise Interrupted
            screen.note(f"{own}: {what}")
            if reference.unscored:
                screen.note(f"{reference.unscored} could not be scored and are not stored: the next fill tries again")
    except Interrupted:
        if speaks:
            print(f"{own}: stopped; the same command goes on from there", flush=True)
    finally:
        destroy_model_parallel()
    return 0


def merge(job: Job) -> int:
    """Join the shards' files into the store, and say what is missing. One process; needs no accelerator.

    Returns:
        0 if the store has all that a run of this job needs, else 1.
    """
    key, prompts = _needed(job)
    store, samples = _store(job.config)
    for file, count in merge_shards(store, key).items():
        print(f"{file}: {count} prompts")
    return _report(store, samples, key, prompts)


def status(job: Job) -> int:
    """Say how much of what a run needs is stored. One process; changes nothing.

    Returns:
        0 if all of it, else 1.
    """
    key, prompts = _needed(job)
    store, samples = _store(job.config)
    for file in shard_files(store):
        with contextlib.closing(RewardStore(file, key, create=False)) as shard:
            print(f"{file}: {_count(shard, prompts, samples)} prompts, for --merge")
    return _report(store, samples, key, prompts)


def needed_prompts(prompts: Sequence[Prompt], sampler: PromptSampler, max_steps: int) -> list[Prompt]:
    """The prompts that steps 0 to ``max_steps`` take, in the order in which they need them.

    Where accuracy decides what they take, all that they may take.
    """
    wanted: dict[int, None] = {}
    for step in range(max_steps):
        if not sampler.knows(step):
            wanted.update(dict.fromkeys(range(len(prompts))))
        if len(wanted) == sampler.num_prompts:
            break
        wanted.update(dict.fromkeys(sampler.indices(step)))
    return [prompts[i] for i in wanted]


def _store(config: Config) -> tuple[str, int]:
    """The file of the reference rewards, and how many a prompt has.

    Raises:
        ConfigError: the algorithm stores none.
    """
    store, samples = config.algorithm.reference_store, config.algorithm.reference_samples
    if store is None or samples is None:
        raise ConfigError(
            f"algorithm.reference={config.algorithm.reference or 'null'}: no reference rewards are stored"
        )
    return store, samples


def _with_store(job: Job, store: str) -> Job:
    algorithm = dataclasses.replace(job.config.algorithm, reference_store=store)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, algorithm=algorithm))


def _not_in(store: str, key: StoreKey, prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """Those of the prompts that the store lacks, the same on all ranks."""

    def missing() -> list[int]:
        if not Path(store).exists():
            return list(range(len(prompts)))
        with contextlib.closing(RewardStore(store, key, create=False)) as opened:
            found = opened.read([prompt.id for prompt in prompts], samples)
        return [i for i, p in enumerate(prompts) if not is_complete(found.get(p.id), samples)]

    return [prompts[i] for i in on_first_rank(missing)]


def _needed(job: Job) -> tuple[StoreKey, list[Prompt]]:
    """The key and the prompts of a run of this job, found by one process whatever the run's layout."""
    config = job.config
    one_rank = dataclasses.replace(
        config.model,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
    )
    initialize(dataclasses.replace(config, model=one_rank))
    try:
        with contextlib.ExitStack() as stack:
            model = config.model
            text = load_text(model.path, job.shape.vocab_size, trust_remote_code=model.trust_remote_code)
            scorer = build_scorer(job.rewards, config.reward_runner, stack)
            data, _ = read_data(config, text.tokenizer, scorer)
            sampling = sampling_of(config, text.end_tokens)
            key = reference_key(config, sampling, scorer)
        return key, needed_prompts(data.prompts, build_sampler(config, data), config.trainer.max_steps)
    finally:
        destroy_model_parallel()


def _report(path: str, samples: int, key: StoreKey, prompts: Sequence[Prompt]) -> int:
    """Print how much of what is needed the store has; 0 if all."""
    count = 0
    if Path(path).exists():
        with contextlib.closing(RewardStore(path, key, create=False)) as store:
            count = _count(store, prompts, samples)
            for parts in store.other_keys():
                print(f"{path}: holds rewards for other settings: {'; '.join(key.differences(parts))}")
    print(f"{path}: {count} of {len(prompts)} prompts have their {samples} reference rewards (key {key.digest})")
    if count < len(prompts):
        print(f"missing: {len(prompts) - count} prompts; fill again with the same settings, which samples only those")
    return 0 if count == len(prompts) else INCOMPLETE


def _count(store: RewardStore, prompts: Sequence[Prompt], samples: int) -> int:
    found = store.read([prompt.id for prompt in prompts], samples)
    return sum(is_complete(rewards, samples) for rewards in found.values())


class _Screen:
    """A progress bar and lines around it; on ranks other than 0 nothing."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm | None = None

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, text: str) -> None:
        """One line."""
        if self._enabled:
            tqdm.write(text, file=sys.stdout)

    def progress(self, done: int, total: int) -> None:
        """So many completions of all that are missing."""
        if not self._enabled:
            return
        if self._bar is None:
            often = 0.1 if sys.stdout.isatty() else LINE_EVERY_S
            self._bar = tqdm(
                total=total,
                desc="reference rewards",
                unit="completion",
                file=sys.stdout,
                mininterval=often,
                smoothing=0.1,
            )
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
