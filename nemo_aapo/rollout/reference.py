"""Rewards of the frozen reference model: sampled once and stored (``cached``), or afresh every step (``online``).

The reference never changes, so the rewards of its completions of a prompt are a fixed distribution. Sampling them
again every step doubles the cost of rollouts; K of them per prompt, stored, cost nothing from then on.

Sample k of a prompt has a random stream of its own, named by seed, prompt and k: its reward is the same whenever, in
whatever order and on whatever layout it is sampled. One whose scoring failed is NaN and is not stored: this process
goes on without it, the next one that needs it samples it again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.errors import ConfigError
from nemo_aapo.reference_store.key import StoreKey
from nemo_aapo.reference_store.store import RewardStore, is_complete, padded
from nemo_aapo.rollout.collector import Collector, Watch
from nemo_aapo.rollout.unscored import ScoringWatch
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Prompt, SamplingSpec

FILL_BATCH = 16
"""Prompts of the first batch of a filling."""
COMMIT_S = 60.0
"""A kill loses about so much of a filling: batches grow as long as they are done within this."""
POLL_S = 1.0
"""Seconds between two looks at the store, while other runs are at all that is left."""
PATIENCE_S = 1800.0
"""Other runs that store nothing of what is waited for within this are taken for stuck."""
PAYS = 1.2
"""They also grow while one of twice the size has so many times the throughput, as an engine on a GPU can be empty."""

ReferenceServed = Callable[[], AbstractContextManager[None]]
"""Gives a context in which the collector's engine serves the reference (``RolloutPipeline.reference_served``)."""


class ReferenceRewards:
    """r' of prompts; collective over all ranks. Rank 0 alone touches the store and tells the others."""

    def __init__(
        self,
        *,
        collector: Collector,
        sampling: SamplingSpec,
        samples: int,
        seed: int,
        key: StoreKey,
        store: RewardStore | None,
        online: bool,
        fill_batch: int = FILL_BATCH,
        first: int = 0,
    ) -> None:
        """Args:
        sampling: the policy's own spec: rewards of completions sampled otherwise can't be compared.
        samples: K.
        key: of the rewards, on all ranks.
        store: on rank 0 in cached mode, else None.
        online: sample afresh every step instead of storing.
        fill_batch: prompts of the first batch while the store is filled; each is one commit.
        first: which prompt to begin with (modulo their number). Runs that fill one store at the same time begin at
            different places, and each skips what the others have stored or are at.
        """
        self.collector, self.sampling, self.samples, self.seed = collector, sampling, samples, seed
        self.key, self.store, self.online = key, store, online
        self.fill_batch, self.first = fill_batch, first
        self._known: dict[str, np.ndarray] = {}
        self._watch = ScoringWatch()

    def has(self, prompts: Sequence[Prompt]) -> bool:
        """Whether all these prompts' rewards are at hand. No collective: all ranks know the same."""
        return all(prompt.id in self._known for prompt in prompts)

    def prepare(
        self,
        prompts: Sequence[Prompt],
        served: ReferenceServed,
        report: Callable[[int, int], None] = lambda done, total: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Cached mode: have the rewards of these prompts at hand, sampling and storing what the store lacks.

        Args:
            served: entered while something is generated.
            report: told (completions done, completions that were missing) as filling goes on.
            stop_requested: asked on every rank, each second; True on one of them ends the filling.

        Returns:
            False if a stop ended it early. What was sampled is stored.

        Raises:
            StoreError: on all ranks.
            RewardError: on all ranks; nothing was ever scored under this key, or nothing any more.
        """
        missing = list({p.id: p for p in prompts if p.id not in self._known}.values())
        self._look_up(missing)
        missing = [p for p in missing if p.id not in self._known]
        if not missing:
            return True
        first = self.first % len(missing)
        waiting, size = missing[first:] + missing[:first], _BatchSize(self.fill_batch)
        total = len(missing) * self.samples
        report(0, total)
        moved = time.monotonic()
        with served(), self._dropping_claims():
            while waiting:
                done, before, began = total - len(waiting) * self.samples, len(waiting), time.monotonic()
                patient = began - moved < PATIENCE_S
                batch, waiting = self._claimed(waiting, size.prompts, patient=patient)
                if patient and len(waiting) < before:
                    moved = time.monotonic()

                def watch(ended: int, done: int = done, most: int = len(batch) * self.samples) -> bool:
                    report(done + min(ended * parallel.data_parallel_size(), most), total)  # others are as far
                    return stop_requested()

                drawn = self._fill(batch, watch)
                if parallel.any_rank(stop_requested())[0]:  # of the batch, only a part may be there
                    return self.has(missing)
                report(total - len(waiting) * self.samples, total)
                if batch:
                    size.observe(drawn, parallel.broadcast_from_first_rank(time.monotonic() - began))
                else:  # all that is left is in other runs' hands
                    time.sleep(POLL_S)
        return True

    def _claimed(self, waiting: list[Prompt], most: int, *, patient: bool) -> tuple[list[Prompt], list[Prompt]]:
        """The next batch, of prompts that no other run is at, and those that are left then.

        Args:
            patient: False: others are taken for stuck, and nothing is left to them: who samples does not matter.
        """
        store = self.store

        def claim() -> list[int]:
            if store is None:
                return list(range(len(waiting[:most])))
            store.require_writable(len(waiting))  # before anything is sampled for it
            store.claims.drop()
            free = (i for i, prompt in enumerate(waiting) if store.claims.take(prompt.id) or not patient)
            return list(itertools.islice(free, most))

        mine = set(parallel.broadcast_from_first_rank(agree(claim)))
        left = [prompt for i, prompt in enumerate(waiting) if i not in mine]
        if not mine:
            self._look_up(left)
            left = [prompt for prompt in left if prompt.id not in self._known]
        return [waiting[i] for i in sorted(mine)], left

    @contextmanager
    def _dropping_claims(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.store is not None:
                self.store.claims.drop()

    def rewards(self, prompts: Sequence[Prompt], step: int, served: ReferenceServed) -> dict[str, np.ndarray]:
        """float64 [K] by prompt id, the same on all ranks; NaN where scoring failed."""
        if self.online:
            seeds = [[stream_seed(self.seed, "online", step, p.id, k) for k in range(self.samples)] for p in prompts]
            with served():
                return self._sample(prompts, seeds)
        self.prepare(prompts, served)
        return {prompt.id: self._known[prompt.id] for prompt in prompts}

    @property
    def unscored(self) -> int:
        """Rewards at hand that are none: their scoring failed."""
        return sum(int(np.isnan(rewards).sum()) for rewards in self._known.values())

    # ------------------------------------------------------------------ what a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Which rewards the run uses: the key's digest and, for people, its parts. The values stay in the store."""
        return {"digest": self.key.digest, "parts": self.key.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See that the run goes on with the rewards it began with.

        Raises:
            ConfigError: they belong to another key; names every part that differs.
        """
        if state["digest"] != self.key.digest:
            differences = "; ".join(self.key.differences(state["parts"]))
            raise ConfigError(
                f"this run began with other reference rewards than those it would go on with: {differences} (there: "
                "its checkpoint; here: now). Restore what has changed, or start a new run (run.name=NAME)"
            )

    # ------------------------------------------------------------------ sampling

    def _look_up(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """What the store has of these prompts, [1..K] by id; prompts with all K are known from then on."""
        ids = [prompt.id for prompt in prompts]
        if not ids:
            return {}
        store = self.store
        read = agree(lambda: {} if store is None else store.read(ids, self.samples))
        found = parallel.broadcast_from_first_rank(read)
        self._watch.proven |= bool(found)
        self._known.update({prompt: row for prompt, row in found.items() if is_complete(row, self.samples)})
        return found

    def _fill(self, batch: Sequence[Prompt], watch: Watch) -> int:
        """Sample what is missing of a batch, and store it, be it broken off by ``watch``; the completions sampled."""
        found = self._look_up(batch)  # once more: another run may have stored some meanwhile
        wanted = [prompt for prompt in batch if prompt.id not in self._known]
        if not wanted:
            return 0
        whole = {prompt.id: padded(found.get(prompt.id), self.samples) for prompt in wanted}
        lacking = {prompt: np.flatnonzero(np.isnan(row)) for prompt, row in whole.items()}
        seeds = [
            [stream_seed(self.seed, "reference", prompt.id, int(k)) for k in lacking[prompt.id]] for prompt in wanted
        ]
        sampled = self._sample(wanted, seeds, watch)
        for prompt, rewards in sampled.items():
            whole[prompt][lacking[prompt][: len(rewards)]] = rewards
        store = self.store
        kept = agree(lambda: {} if store is None else store.write(whole))
        everywhere = parallel.broadcast_from_first_rank(kept)
        ended = {prompt for prompt, rewards in sampled.items() if len(rewards) == len(lacking[prompt])}
        self._known.update({prompt: rewards for prompt, rewards in everywhere.items() if prompt in ended})
        return sum(map(len, sampled.values()))

    def _sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], watch: Watch | None = None
    ) -> dict[str, np.ndarray]:
        # Lengths are not observed: how many there are depends on what the store held, and a run must not.
        groups = self.collector.collect(prompts, self.sampling, seeds, observe_lengths=False, watch=watch)
        self._watch.check(self.collector.tally, "the reference rewards", asked=sum(map(len, seeds)))
        mine = [(group.prompt.id, group.rewards) for group in groups]
        return dict(item for part in parallel.gather_data_parallel(mine) for item in part)


class _BatchSize:
    """Prompts of the next batch: by the time that the last one took, not by their number alone."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self._rate = 0.0  # completions a second of the last batch that was smaller
        self._largest = False  # larger ones take longer for nothing

    def observe(self, completions: int, seconds: float) -> None:
        """A batch of this size gave so many completions; the same numbers on all ranks."""
        rate = completions / max(seconds, 1e-9)
        if seconds < COMMIT_S / 2:
            self.prompts *= 2
        elif seconds > COMMIT_S and not self._largest:
            self._largest = rate < PAYS * self._rate
            self.prompts = max(1, self.prompts // 2) if self._largest else self.prompts * 2
        self._rate = rate
