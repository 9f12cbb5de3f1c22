"""Rewards of the frozen reference model: drawn once and stored (``cached``), or afresh every step (``online``).

The reference never changes, so the rewards of its completions of a prompt are a fixed distribution. Drawing them again
every step doubles the cost of rollouts; K of them per prompt, stored, cost nothing from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from nemo_aapo import parallel
from nemo_aapo.rollout.collect import Collector
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Prompt, SamplingSpec

FILL_BATCH = 64
"""Prompts between two commits while the store is filled: what an interruption can lose."""


def store_key(reference_digest: str, sampling: SamplingSpec, rewards: Sequence[Mapping], seed: int) -> str:
    """Digest of everything that reference rewards depend on besides the prompt: 16 hex digits."""
    parts = [reference_digest, dataclasses.asdict(sampling), list(rewards), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class RewardStore:
    """Reference rewards by prompt, in one SQLite file that runs can share one after the other.

    ``key`` digests everything the rewards depend on besides the prompt: the reference's weights, the sampling, the
    rewards' definition, the seed. Rewards stored under another key are never seen.
    """

    def __init__(self, path: str | Path, key: str) -> None:
        self.key = key
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60.0)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS rewards "
            "(key TEXT, prompt TEXT, sample INTEGER, reward REAL, PRIMARY KEY (key, prompt, sample))"
        )
        self._db.commit()

    def read(self, prompt_ids: Sequence[str], samples: int) -> dict[str, np.ndarray]:
        """float64 [samples] of each prompt of which at least so many are stored."""
        found = {}
        for prompt_id in prompt_ids:
            rows = self._db.execute(
                "SELECT reward FROM rewards WHERE key = ? AND prompt = ? AND sample < ? ORDER BY sample",
                (self.key, prompt_id, samples),
            ).fetchall()
            if len(rows) == samples:
                found[prompt_id] = np.array([reward for (reward,) in rows], dtype=np.float64)
        return found

    def write(self, rewards: dict[str, np.ndarray]) -> None:
        """Store the rewards [K] of some prompts; all of them or, if interrupted, none."""
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO rewards VALUES (?, ?, ?, ?)",
                [(self.key, prompt, k, float(r)) for prompt, row in rewards.items() for k, r in enumerate(row)],
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class ReferenceRewards:
    """r' of prompts; collective over all ranks. Rank 0 alone touches the store and tells the others."""

    def __init__(
        self,
        *,
        collector: Collector,
        sampling: SamplingSpec,
        samples: int,
        seed: int,
        store: RewardStore | None,
        reference_weights: Callable[[], AbstractContextManager[None]],
        online: bool,
    ) -> None:
        """Args:
        sampling: the policy's own spec: rewards drawn otherwise can't be compared.
        samples: K.
        store: on rank 0 in cached mode, else None.
        reference_weights: a context in which the engine draws from the reference.
        online: draw afresh every step instead of storing.
        """
        self.collector, self.sampling, self.samples, self.seed = collector, sampling, samples, seed
        self.store, self.reference_weights, self.online = store, reference_weights, online
        self._known: dict[str, np.ndarray] = {}

    def prepare(self, prompts: Sequence[Prompt], report: Callable[[int, int], None]) -> None:
        """Cached mode: make sure that the rewards of these prompts are stored, drawing what is missing.

        Args:
            report: told (prompts done, prompts in all) as filling goes on.
        """
        self._look_up(prompts)
        missing = list({p.id: p for p in prompts if p.id not in self._known}.values())
        with self.reference_weights() if missing else contextlib.nullcontext():
            for start in range(0, len(missing), FILL_BATCH):
                batch = missing[start : start + FILL_BATCH]
                drawn = self._draw(batch, lambda prompt, k: stream_seed(self.seed, "reference", prompt.id, k))
                if self.store is not None:
                    self.store.write(drawn)
                self._known.update(drawn)
                report(min(start + FILL_BATCH, len(missing)), len(missing))

    def rewards(self, prompts: Sequence[Prompt], step: int) -> dict[str, np.ndarray]:
        """float64 [K] by prompt id, the same on all ranks."""
        if self.online:
            with self.reference_weights():
                return self._draw(prompts, lambda prompt, k: stream_seed(self.seed, "online", step, prompt.id, k))
        self.prepare(prompts, lambda done, total: None)
        return {prompt.id: self._known[prompt.id] for prompt in prompts}

    def _look_up(self, prompts: Sequence[Prompt]) -> None:
        wanted = [prompt.id for prompt in prompts if prompt.id not in self._known]
        if wanted:
            found = self.store.read(wanted, self.samples) if self.store is not None else None
            self._known.update(parallel.broadcast_from_first_rank(found))

    def _draw(self, prompts: Sequence[Prompt], seed: Callable[[Prompt, int], int]) -> dict[str, np.ndarray]:
        seeds = [[seed(prompt, k) for k in range(self.samples)] for prompt in prompts]
        groups = self.collector.collect(prompts, self.sampling, seeds)
        mine = [(group.prompt.id, group.rewards) for group in groups]
        return dict(item for part in parallel.gather_data_parallel(mine) for item in part)
