"""From prompts to scored groups: generation spread over the data-parallel ranks, rewards scored meanwhile."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.engines.base import BackgroundEngine, OnFinish, PendingCompletions, RolloutEngine, RolloutStats
from nemo_aapo.engines.elsewhere import arranged
from nemo_aapo.errors import Interrupted
from nemo_aapo.rollout.length_predictor import LengthPredictor
from nemo_aapo.rollout.scored import Banking, Found, Keep, engine_metrics, mean_lengths, scores_of
from nemo_aapo.rollout.spread import Place, own_shard, owner, ranks_in_step, spread, with_one_prompt
from nemo_aapo.rollout.unscored import Score, Tally
from nemo_aapo.trace import spans
from nemo_aapo.types import Completion, Group, Prompt, SamplingSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

Watch = Callable[[int], bool]
"""Called on every rank about once in ``WATCH_S``, with the completions of its shard that have ended; True: enough."""
WATCH_S = 1.0


class RewardScorer(Protocol):
    """What the collector needs of ``rewards.workers.runner.RewardRunner``."""

    def submit(self, index: Any, prompt: Prompt, text: str, completion: Completion) -> None:
        """Start scoring one completion; returns at once. May be called from several threads."""

    def collect(self, indices: Collection[Any]) -> Mapping[Any, Score]:
        """Wait for the scores of these completions, by index; those of others that were submitted stay."""
        ...


@runtime_checkable
class ChecksAnswers(Protocol):
    """A scorer that tells beforehand which gold answers it can't work with."""

    def check_answer(self, answer: str) -> None:
        """Raise ValueError for such an answer."""


@runtime_checkable
class Defined(Protocol):
    """A scorer that says what its scores depend on, so that stored ones can be told apart."""

    def definition(self) -> list[dict[str, Any]]: ...


@dataclass(slots=True, eq=False)
class _Shard:
    """This data-parallel rank's part of the prompts, while its completions are generated and scored."""

    number: int
    """Tells its completions from those of others that are under way."""
    order: Sequence[int]
    """Where each prompt stands among the shard's: they enter the engine longest expected first."""
    prompts: Sequence[Prompt]
    seeds: Sequence[Sequence[int]]
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    """The texts of the completions that have ended, by prompt and completion, on the model-parallel source rank."""
    places: Sequence[Sequence[Place]] | None = None
    """Where completions are spread over ranks: which one of all each is. None: they are of this rank's own groups."""
    found: Found = field(default_factory=dict)
    """By prompt of the shard; they have no seeds here."""
    keep: Keep | None = None
    ended: dict[int, dict[int, Completion]] = field(default_factory=dict)
    """By prompt and number: what ``keep`` is told of when the last has come."""

    @property
    def all_found(self) -> bool:
        """Whether nothing is left to generate."""
        return bool(self.found) and len(self.found) == len(self.prompts)

    @property
    def token_ids(self) -> list[np.ndarray]:
        """int32 [P] for each prompt, what the engine is fed."""
        return [prompt.token_ids for prompt in self.prompts]


@dataclass(frozen=True, slots=True, eq=False)
class BegunRollout:
    """A rollout whose completions are generated in the background while this process does something else."""

    shard: _Shard
    completions: PendingCompletions


@dataclass(slots=True)
class Collector:
    """Generates and scores completions; collective over all ranks of the job."""

    engine: RolloutEngine
    rewards: RewardScorer | None
    """The scorer, on the model-parallel source rank; None elsewhere, and on all ranks where groups get no rewards."""
    decode: Callable[[np.ndarray], str]
    """Token ids -> text, without padding and the token that ended the completion."""
    offload: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while the engine generates: what only the learner needs leaves GPU memory for so long."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The last call's on this rank: ``rollout`` (waiting for completions) and ``reward`` (for scores after that)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last call's over all ranks: see ``engine_metrics``."""
    tally: Tally = field(default_factory=Tally)
    """The last call's over all ranks: how many completions were scored."""
    lengths: list[tuple[str, float]] = field(default_factory=list)
    """The last call's over all ranks: (prompt id, mean tokens of its completions), in the order of the prompts."""
    length_predictor: LengthPredictor = field(default_factory=LengthPredictor)
    """Decides which prompts enter the engine first; the same on all ranks."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def collect(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        observe_lengths: bool = True,
        watch: Watch | None = None,
        **bank: Unpack[Banking],
    ) -> list[Group]:
        """This data-parallel rank's shard of the prompts, completed and scored.

        Rank d of D takes prompts ``own_shard(len(prompts))``: neighbours, so that the gathered shards are in order.
        The texts exist on the model-parallel source rank only; tokens and rewards on all ranks.

        Args:
            prompts: the same on all ranks.
            sampling: temperature, lengths, stop tokens and stop strings.
            seeds: ``seeds[i][j]`` of completion j of prompt i, as ``RolloutEngine.generate`` takes them.
            observe_lengths: let the completions' lengths decide the order of later calls.
            watch: once it has returned True, what has not ended is broken off, and a group has its first completions
                only, be it none.
            bank: has no effect where completions are spread over ranks.

        Raises:
            Interrupted: on all ranks; a stop broke off the waiting for servers or rewards, and all of it is lost.
        """
        spread_out = self._spread(prompts, seeds)
        shard = self._shard(prompts, seeds) if spread_out else self._shard(prompts, seeds, **bank)
        work = spread_out or shard
        start = time.perf_counter()
        self._score_found(shard)
        completions: list[list[Completion]] | Interrupted = [[] for _ in work.prompts]
        if not shard.all_found:
            with self.offload():
                self.engine.wake()
                ask = functools.partial(self.engine.generate, work.token_ids, sampling, work.seeds)
                completions = _unless_stopped(lambda: ask(self._scoring(work, watch)))
                self.engine.sleep()
        return self._groups(shard, completions, start, observe_lengths, work)

    def begin(
        self, prompts: Sequence[Prompt], sampling: SamplingSpec, seeds: Sequence[Sequence[int]], **bank: Unpack[Banking]
    ) -> BegunRollout:
        """As ``collect`` without ``observe_lengths``, but returns at once. Several may be under way.

        Raises:
            TypeError: the engine can't generate in the background.
        """
        engine = self.engine
        if not isinstance(engine, BackgroundEngine):
            raise TypeError(f"{type(engine).__name__} generates while everybody waits: it is no BackgroundEngine")
        shard = self._shard(prompts, seeds, **bank)
        self._score_found(shard)
        return BegunRollout(shard, engine.start(shard.token_ids, sampling, shard.seeds, self._scoring(shard)))

    def finish(self, rollout: BegunRollout) -> list[Group]:
        """Wait for what ``begin`` began."""
        start = time.perf_counter()
        return self._groups(rollout.shard, _unless_stopped(rollout.completions.result), start, observe_lengths=False)

    def _scoring(self, shard: _Shard, watch: Watch | None = None) -> OnFinish | None:
        """What has each completion scored as soon as it ends, which one rank does, and asks whether it is enough."""
        scorer, enough = self.rewards, _watched(watch)
        if scorer is None:
            return None if watch is None else lambda i, j, completion: enough()

        def score(i: int, j: int, completion: Completion) -> bool:
            shard.texts[i, j] = self.decode(completion.token_ids)
            scorer.submit((shard.number, i, j), shard.prompts[i], shard.texts[i, j], completion)
            if shard.keep is not None and i not in shard.found:
                ended = shard.ended.setdefault(i, {})
                ended[j] = completion
                if len(ended) == len(shard.seeds[i]):
                    shard.keep(shard.prompts[i], [ended[j] for j in sorted(ended)])
            if spans.recorder is not None:
                spans.recorder.sample("completions", ended=len(shard.texts))
            return enough()

        return score

    def _score_found(self, shard: _Shard) -> None:
        """Have what was generated before scored as if it ended now."""
        if (score := self._scoring(shard)) is not None:
            for i, row in shard.found.items():
                for j, completion in enumerate(row):
                    score(i, j, completion)

    def _shard(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        found: Found | None = None,
        keep: Keep | None = None,
    ) -> _Shard:
        mine = own_shard(len(prompts))
        first, prompts, seeds = mine.start, prompts[mine], seeds[mine]
        order = self.length_predictor.longest_first(prompts)
        before = {place: found[first + i] for place, i in enumerate(order) if found and first + i in found}
        left = [[] if place in before else seeds[i] for place, i in enumerate(order)]
        return _Shard(next(self._numbers), order, [prompts[i] for i in order], left, found=before, keep=keep)

    def _spread(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> _Shard | None:
        """What this rank's engine generates where ranks decode in step (``spread``); None: its own shard."""
        ranks = ranks_in_step(self.engine.shares_weights)
        if ranks == 1:
            return None
        rank = parallel.data_parallel_rank()
        neighbours = range(rank - rank % ranks, rank - rank % ranks + ranks)
        theirs = [i for other in neighbours for i in range(len(prompts))[own_shard(len(prompts), other)]]
        expected = self.length_predictor.expected([prompts[i] for i in theirs])
        taken: dict[int, list[int]] = {}  # of each prompt which completions, longest expected first
        for k, j in spread(expected, [len(seeds[i]) for i in theirs], ranks)[rank % ranks]:
            taken.setdefault(theirs[k], []).append(j)
        return _Shard(
            number=next(self._numbers),
            order=range(len(taken)),
            prompts=[prompts[i] for i in taken],
            seeds=[[seeds[i][j] for j in row] for i, row in taken.items()],
            places=[[Place(i, j) for j in row] for i, row in taken.items()],
        )

    def _groups(
        self,
        shard: _Shard,
        generated: list[list[Completion]] | Interrupted,
        start: float,
        observe_lengths: bool = True,
        work: _Shard | None = None,
    ) -> list[Group]:
        ended, did = time.perf_counter(), work or shard

        def judge() -> tuple[list[list[Completion]], Mapping[Hashable, Score]]:
            if isinstance(generated, Interrupted):
                raise generated
            return [list(shard.found.get(i, row)) for i, row in enumerate(generated)], self._judged(did)

        # One rank judges and tells the others: a timeout could strike on one of them and not on the next.
        completions, judged = agree(judge)
        if did.places is not None:
            completions, judged = _brought_home(shard, did.places, completions, did.texts, judged)
        own = scores_of(judged, [0 if self.rewards is None else len(row) for row in completions])
        scores, tally = parallel.broadcast_in_model_parallel((own, Tally.of(list(judged.values()))))
        judged_at = time.perf_counter()
        self.seconds = {"rollout": ended - start, "reward": judged_at - ended}
        spans.timed("rollout", start, ended)
        spans.timed("reward", ended, judged_at)
        groups = [
            Group(
                prompt=prompt,
                completions=with_one_prompt(row),
                texts=() if self.rewards is None else tuple(shard.texts[i, j] for j in range(len(row))),
                rewards=scores[i].rewards,
                reward_parts=scores[i].parts,
                failed=scores[i].failed,
            )
            for i, (prompt, row) in enumerate(zip(shard.prompts, completions, strict=True))
        ]
        groups = [group for _, group in sorted(zip(shard.order, groups, strict=True), key=lambda pair: pair[0])]
        self._record(groups, tally, None if shard.all_found else self.engine.stats)
        if observe_lengths:
            self.length_predictor.observe(self.lengths)
        return groups

    def _judged(self, work: _Shard) -> Mapping[Hashable, Score]:
        """The scores of what this rank generated, by prompt and completion; none but on the source rank."""
        if self.rewards is None:
            return {}
        scores = self.rewards.collect([(work.number, *place) for place in work.texts])
        return {(i, j): score for (_, i, j), score in scores.items()}

    def _record(self, groups: Sequence[Group], tally: Tally, stats: RolloutStats | None) -> None:
        """Metrics, lengths and the tally of scores over all data-parallel ranks."""
        everyone = parallel.gather_data_parallel((stats, mean_lengths(groups), tally))
        self.metrics = engine_metrics([stats for stats, *_ in everyone if stats is not None])
        self.tally = sum((part for *_, part in everyone), Tally())
        self.lengths = [length for _, part, _ in everyone for length in part]


def _unless_stopped(generate: Callable[[], list[list[Completion]]]) -> list[list[Completion]] | Interrupted:
    """The completions; the error where a stop came, of which other ranks may not know yet."""
    try:
        return generate()
    except Interrupted as error:
        return error


def _watched(watch: Watch | None) -> Callable[[], bool]:
    """What is called as each completion ends, and calls ``watch`` now and then; the last answer."""
    count, called, answer = 0, time.monotonic(), False

    def ended() -> bool:
        nonlocal count, called, answer
        count += 1
        if watch is not None and not answer and time.monotonic() - called >= WATCH_S:
            called, answer = time.monotonic(), watch(count)
        return answer

    return ended


def _brought_home(
    shard: _Shard,
    places: Sequence[Sequence[Place]],
    completions: Sequence[Sequence[Completion]],
    texts: Mapping[tuple[int, int], str],
    judged: Mapping[Hashable, Score],
) -> tuple[list[list[Completion]], dict[Hashable, Score]]:
    """Completions and scores of this rank's own groups, which other ranks generated and judged. Collective.

    Args:
        shard: this rank's groups; gets the texts.
        places: which ones the completions are that this rank generated, with their texts and scores.
    """
    prompts = sum(parallel.gather_data_parallel(len(shard.prompts)))
    outgoing: list[list[Any]] = [[] for _ in range(parallel.data_parallel_size())]
    for i, row in enumerate(completions):
        for n, completion in enumerate(row):
            place, told = places[i][n], (completion, texts.get((i, n)), judged.get((i, n)))
            outgoing[owner(place.prompt, prompts, len(outgoing))].append((place, told))
    first = own_shard(prompts).start
    local = {first + number: i for i, number in enumerate(shard.order)}
    found = {(local[prompt], j): told for (prompt, j), told in parallel.exchange_data_parallel(outgoing)}
    shard.texts.update({place: text for place, (_, text, _) in found.items() if text is not None})
    rows = arranged([(i, j, completion) for (i, j), (completion, *_) in found.items()], shard.seeds)
    return rows, {place: score for place, (*_, score) in found.items() if score is not None}
