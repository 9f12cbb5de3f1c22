"""The reference rewards of a configuration: their key, their store, and what samples them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.reference_store.key import StoreKey, store_key
from nemo_aapo.reference_store.store import RewardStore, other_rewards
from nemo_aapo.rollout.collector import Collector, Defined, RewardScorer
from nemo_aapo.rollout.reference import FILL_BATCH, ReferenceRewards
from nemo_aapo.run.reporter import Notes
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import SamplingSpec
from nemo_aapo.utils.safetensors import model_digest


def reference_key(config: Config, sampling: SamplingSpec, scorer: RewardScorer | None) -> StoreKey:
    """What the run's reference rewards belong to. Reads all weights of the model, for their digest.

    Args:
        scorer: on rank 0; without a ``definition`` of its own the entries of the configuration stand for it.

    Raises:
        ConfigError: a part of it can't be found.
    """
    definition = scorer.definition() if isinstance(scorer, Defined) else list(config.rewards)
    digest, data = model_digest(config.model.path), config.data
    return store_key(digest, sampling, definition, config.seed, data.date, data.template_arguments)


def open_reference_store(
    config: Config,
    sampling: SamplingSpec,
    scorer: RewardScorer | None,
    reporter: Notes,
    stack: contextlib.ExitStack,
    new_key: bool,
) -> tuple[StoreKey | None, RewardStore | None]:
    """The key of the reference rewards, on all ranks, and the store that cached ones are kept in, on rank 0.

    Args:
        new_key: take a named store even if it holds nothing but other runs' rewards.

    Raises:
        ConfigError, StoreError: on all ranks; see ``reward_store``.
    """
    algorithm = config.algorithm

    def open_store() -> tuple[StoreKey | None, RewardStore | None]:
        if algorithm.reference is None or parallel.rank() != 0:
            return None, None
        key, path = reference_key(config, sampling, scorer), algorithm.reference_store
        if path is None:  # sampled afresh every step
            return key, None
        store = stack.enter_context(contextlib.closing(RewardStore(path, key)))
        own = new_key or Path(path).absolute().is_relative_to(Path(config.run.dir).absolute())
        if note := other_rewards(store, own=own):
            reporter.note(note)
        return key, store

    key, store = agree(open_store)
    return parallel.broadcast_from_first_rank(key), store


def build_reference(
    config: Config,
    collector: Collector,
    sampling: SamplingSpec,
    key: StoreKey | None,
    store: RewardStore | None,
) -> ReferenceRewards | None:
    """Where reference rewards come from; None for an algorithm without a margin."""
    samples = config.algorithm.reference_samples
    if key is None or samples is None:
        return None
    return ReferenceRewards(
        collector=collector,
        sampling=sampling,
        samples=samples,
        seed=config.seed,
        key=key,
        store=store,
        online=config.algorithm.reference == "online",
        fill_batch=max(FILL_BATCH, parallel.data_parallel_size()),
        first=stream_seed(config.run.dir),
    )
