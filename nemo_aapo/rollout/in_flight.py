"""Rollouts in flight (``rollout.max_lag``): new weights between two tokens, and a step trains on what is there.

    refit | begin groups for freed slots, wait for any B groups that may go | train k | refit | begin ...

Groups begin in the order of their prompts, (L + 1) x B of them at a time, and go on by each policy that comes while
they are under way. A step trains on B groups that are in hand, oldest first, so that none is ever trained on more than
L steps after the policy that sampled its first token (``buffer.InFlight``). Which ones these are depends on how fast
everybody was: the run is not deterministic. But it is repeatable: groups and choices are kept in the bank, and a run
that goes on after a kill makes the same steps again (``saved/timeline.py``).

A checkpoint holds the groups in hand. Those under way begin anew in a run that goes on from it, with the same prompts:
were they left out, long completions would be missing more often than short ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_aapo.config import Config
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree, first_error, on_first_rank
from nemo_aapo.engines.base import RolloutStats
from nemo_aapo.errors import Interrupted
from nemo_aapo.rollout.buffer import InFlight, Key, State
from nemo_aapo.rollout.collector import BegunRollout
from nemo_aapo.rollout.pipeline import RolloutPipeline
from nemo_aapo.rollout.saved import pending
from nemo_aapo.rollout.saved.bank import completions_of
from nemo_aapo.rollout.saved.timeline import repeated_until
from nemo_aapo.rollout.scored import engine_metrics, mean_lengths, scores_of
from nemo_aapo.rollout.spread import own_shard, owner
from nemo_aapo.rollout.unscored import Tally
from nemo_aapo.types import Completion, Group, Prompt

POLL_S = 0.1
"""Pause before ranks tell one another again which groups have ended; all ranks of the job take part each time."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A group of this rank that is under way or in hand."""

    rollout: BegunRollout
    number: int
    """Among the prompts of this rank's part of the rollout."""


class InFlightPipeline(RolloutPipeline):
    """A step trains on whatever groups are in hand; see ``RolloutPipeline`` for what its methods do and raise."""

    def __init__(self, *, config: Config, **parts: Any) -> None:
        """As ``RolloutPipeline``."""
        assert config.rollout.max_lag is not None
        super().__init__(InFlight(config.rollout.max_lag), config=config, **parts)
        self._steps_needed = config.rollout.max_lag + 1
        self._cursor = 0  # the first step of the sampler's whose groups have not begun
        self._again: list[Key] = []  # begun by the process before this one, and lost
        self._in_hand: list[Key] = []  # what the file of a checkpoint holds
        self._begun: dict[Key, _Begun] = {}  # this rank's
        self._judgements: dict[Key, tuple[Group, Tally]] = {}  # of this rank's in hand, until all ranks have theirs
        self._scored: dict[Key, Group] = {}  # this rank's in hand
        self._scored_early = Tally()  # what was scored for a checkpoint since the last step
        self._ended: queue.SimpleQueue[Key] = queue.SimpleQueue()  # this rank's, as servers tell
        self._found: dict[Key, tuple[Completion, ...]] = {}  # in the bank
        self._repeated: dict[int, list[Key]] = {}  # what steps are to be trained on again
        self._not_before: dict[Key, int] = {}  # found, but sampled by a policy of so many steps too
        self._covered: dict[int, int] = {}  # by checkpoint: groups of earlier steps are in it
        self._since = time.perf_counter()

    # ------------------------------------------------------------------ a step

    def begin(self, step: int) -> None:
        """Have groups begun in all slots that are free, by the policy as it stands before this step."""
        self._trained_before(step)
        for later in sorted({of for of, _ in self._again}):
            self._begin([key for key in self._again if key[0] == later])
        self._again = []
        end = min(step + self.buffer.policy.depth + 1, self.config.trainer.max_steps)
        while self._cursor < end:
            self._begin([(self._cursor, i) for i in range(prompts_drawn(self.config))])
            self._cursor += 1

    def generate(self, step: int) -> list[Group]:
        """This rank's part of the groups that the step trains on, as soon as there are some that may go."""
        self.seconds = {**dict.fromkeys(("reward", "reference"), 0.0), "refit": self.seconds.get("refit", 0.0)}
        self._trained_before(step)
        with self._timed("rollout"):
            keys = self._next(step)
        with self._timed("reward"):
            tally = self._scored_early + self._score(keys)
        self._scored_early = Tally()
        self._watch.check(tally, f"step {step + 1}")
        with self._timed("reference"):
            prompts = [self.prompts(of)[i] for of, i in keys]
            rewards = self.reference.rewards(prompts, step, self.reference_served) if self.reference else {}
        self.seconds["in_hand"] = self.buffer.oldest(State.IN_HAND)
        self.buffer.take(keys)
        if self.bank is not None and parallel.rank() == 0:
            self.bank.took(step, keys)
        groups = self._dealt(keys)
        self._measure(groups)
        self.sampler.step = step + 1
        return [group.replace(reference_rewards=rewards.get(group.prompt.id)) for group in groups]

    def not_begun(self) -> int | None:
        """By the process before this one, if it has ended."""
        end = min(self.sampler.step + self.buffer.policy.depth, self.config.trainer.max_steps)
        return self._cursor if self._cursor < end else None

    def settle(self) -> None:
        """Wait until the servers have ended all that they have."""
        while set(self.buffer.keys(State.UNDER_WAY)) - self._not_before.keys():
            self._wait()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Also which groups have begun, and which of them the file of the last ``pending_files`` holds."""
        under_way, in_hand = (list(map(list, keys)) for keys in (self._left_out(), self._in_hand))
        begun = {"cursor": self._cursor, "under_way": under_way, "in_hand": in_hand}
        return {**super().state_dict(), "in_flight": begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ``load_pending`` brings the groups in hand."""
        super().load_state_dict(state)
        begun = state["in_flight"]
        self._cursor = int(begun["cursor"])
        self._again, self._in_hand = ([(int(of), int(i)) for of, i in begun[name]] for name in ("under_way", "in_hand"))

    def pending_files(self) -> dict[str, bytes]:
        """The groups in hand that are scored. Those under way are not waited for."""
        self._trained_before(self.sampler.step)
        self._hear()
        with contextlib.suppress(Interrupted):  # a stop broke off the wait for scores
            self._scored_early += self._score(self.buffer.keys(State.IN_HAND))
        # What could not be scored at all is better scored anew.
        mine = {key: group for key, group in self._scored.items() if not group.failed.all()}
        groups = {key: group for part in parallel.gather_data_parallel(mine) for key, group in part.items()}
        self._in_hand = sorted(groups)
        self._covered[self.sampler.step] = min([of for of, _ in self._left_out()], default=self._cursor)
        if not groups:
            return {}
        return {pending.FILE_NAME: pending.pack([groups[k] for k in self._in_hand]) if parallel.rank() == 0 else b""}

    def load_pending(self, checkpoint: Path, step: int) -> None:
        """Take up the groups that a checkpoint holds."""
        path, keys = checkpoint / pending.FILE_NAME, self._in_hand
        content = parallel.broadcast_from_first_rank(path.read_bytes() if keys and parallel.rank() == 0 else b"")
        if not keys:
            return
        self._taken_up = True
        groups = pending.unpack(content, [self.prompts(of)[i] for of, i in keys])
        for key, group in zip(keys, groups, strict=True):
            self.buffer.restore(key, self._steps_behind(group.completions)[0])
        mine = own_shard(len(keys))
        self._scored.update(zip(keys[mine], groups[mine], strict=True))

    def recover(self) -> None:
        """Take up what the bank holds of groups that are not trained on, and of the choices of steps to come."""
        if (bank := self.bank) is None:
            return
        records, taken = on_first_rank(lambda: (bank.recover(), bank.taken()))
        again, done = set(self._again), self.buffer.done
        for of in records:
            prompts = self.prompts(of)
            for i, completions in completions_of(records[of], prompts, None, self.config.group_size).items():
                if of >= self._cursor or (of, i) in again:
                    self._found[of, i] = completions
        newest = {key: self._steps_behind(completions)[1] for key, completions in self._found.items()}
        end = repeated_until(done, self.buffer.keys(State.IN_HAND), newest, taken)
        self._repeated = {step: taken[step] for step in range(done, end)}
        self._found = {key: completions for key, completions in self._found.items() if newest[key] <= end}
        self._taken_up |= bool(self._found)
        if parallel.rank() == 0:
            if self._found or end > done:
                bank.note(
                    f"taking up {len(self._found)} groups that were generated before, and making {end - done} steps "
                    "again as they were"
                )
            left = {of: [r for r in records[of] if self._is_found(of, r)] for of in records}
            on_disk = {of: rows for of, rows in left.items() if rows}
            on_first_rank(lambda: bank.keep_only(on_disk, end))
        else:
            on_first_rank(lambda: None)

    def checkpointed(self, step: int) -> None:
        """Let go of what a checkpoint that is whole on the disk holds."""
        if self.bank is not None and step:
            if step >= self.config.trainer.max_steps:
                self.bank.remove()
            elif step in self._covered:
                self.bank.forget(self._covered[step], step)

    # ------------------------------------------------------------------ parts

    def _begin(self, keys: Sequence[Key]) -> None:
        """Groups of one step of the sampler, which have slots from now on."""
        self._require_refitted()
        step, numbers = keys[0][0], [i for _, i in keys]
        prompts, seeds = self.prompts(step), self._seeds(step, self.prompts(step))
        found = {place: self._found.pop(key) for place, key in enumerate(keys) if key in self._found}
        for place, key in enumerate(keys):
            if place not in found:
                self.buffer.start(key)
                continue
            oldest, self._not_before[key] = self._steps_behind(found[place])
            self.buffer.restore(key, min(oldest, self.buffer.done), State.UNDER_WAY)
        # By the object, as a source without end may make a prompt twice; the rollout keeps them alive.
        by_prompt = {id(prompts[i]): (step, i) for i in numbers}

        def keep(prompt: Prompt, completions: Sequence[Completion]) -> None:
            if self.bank is not None:
                self.bank.add(step, prompt, completions)
            self._ended.put(by_prompt[id(prompt)])

        rollout = self.collector.begin(
            [prompts[i] for i in numbers], self.sampling, [seeds[i] for i in numbers], found=found, keep=keep
        )
        own = keys[own_shard(len(keys))]
        for number, place in enumerate(rollout.shard.order):
            self._begun[own[place]] = _Begun(rollout, number)

    def _next(self, step: int) -> list[Key]:
        """Wait for the groups of a step."""
        repeated = self._repeated.pop(step, None)
        while True:
            keys = self.buffer.next() if repeated is None else repeated
            if keys is not None and set(keys) <= set(self.buffer.keys(State.IN_HAND)):
                return keys
            self._wait()

    def _wait(self) -> None:
        """Wait a moment, and hear what has ended meanwhile; raises what ended the servers' work before its end."""
        time.sleep(POLL_S)
        self._hear()
        errors = (begun.rollout.completions.error() for begun in self._begun.values())
        if (error := first_error(next(filter(None, errors), None))) is not None:
            raise error

    def _hear(self) -> None:
        """Learn on all ranks which groups have ended on any. Collective."""
        mine = parallel.broadcast_in_model_parallel([self._ended.get() for _ in range(self._ended.qsize())])
        ended = [key for part in parallel.gather_data_parallel(mine) for key in part]
        for key in [key for key, steps in self._not_before.items() if steps <= self.buffer.done]:
            del self._not_before[key]
            ended.append(key)
        for key in ended:
            self.buffer.drawn(key)

    def _score(self, keys: Collection[Key]) -> Tally:
        """Have groups in hand scored that are not yet; over all ranks, how many completions were scored now."""
        mine = [key for key in keys if key in self._begun]
        scores = self.collector.rewards is not None

        def judge() -> list[tuple[Group, Tally]]:
            for key in mine if scores else ():
                if key not in self._judgements:  # by an earlier call that a stop broke off
                    self._judgements[key] = self._judged(self._begun[key])
            return [self._judgements[key] for key in mine] if scores else []

        # One rank judges and tells the others: a timeout could strike on one of them and not on the next.
        told = parallel.broadcast_in_model_parallel(agree(judge))
        for key, (group, _) in zip(mine, told, strict=True):
            self._scored[key] = group
            self._judgements.pop(key, None)
            del self._begun[key]
        return sum(parallel.gather_data_parallel(sum((tally for _, tally in told), Tally())), Tally())

    def _judged(self, begun: _Begun) -> tuple[Group, Tally]:
        """A group whose completions have ended, with their scores, which are waited for."""
        shard, i, scorer = begun.rollout.shard, begun.number, self.collector.rewards
        assert scorer is not None
        row = tuple(shard.found[i]) if i in shard.found else tuple(c for _, c in sorted(shard.ended[i].items()))
        scores = scorer.collect([(shard.number, i, j) for j in range(len(row))])  # a stop may break it off
        shard.ended.pop(i, None)
        (found,) = scores_of({(0, j): score for (_, _, j), score in scores.items()}, [len(row)])  # type: ignore[misc]
        group = Group(
            prompt=shard.prompts[i],
            completions=row,
            texts=tuple(shard.texts.pop((i, j)) for j in range(len(row))),
            rewards=found.rewards,
            reward_parts=found.parts,
            failed=found.failed,
        )
        return group, Tally.of(list(scores.values()))

    def _dealt(self, keys: Sequence[Key]) -> list[Group]:
        """This rank's part of the groups, in their order, wherever they were generated."""
        outgoing: list[list[tuple[int, Group]]] = [[] for _ in range(parallel.data_parallel_size())]
        for place, key in enumerate(keys):
            if key in self._scored:
                outgoing[owner(place, len(keys), len(outgoing))].append((place, self._scored.pop(key)))
        return [group for _, group in sorted(parallel.exchange_data_parallel(outgoing), key=lambda pair: pair[0])]

    def _measure(self, groups: Sequence[Group]) -> None:
        tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        stats = RolloutStats(tokens, seconds, steps=0, tail_factor=1.0, idle_fraction=np.nan)
        everyone = parallel.gather_data_parallel((stats, mean_lengths(groups)))
        self.metrics = engine_metrics([stats for stats, _ in everyone]) | self._refit_metrics
        self.collector.length_predictor.observe([length for _, part in everyone for length in part])

    def _steps_behind(self, completions: Sequence[Completion]) -> tuple[int, int]:
        """The steps behind the oldest and the newest policy that sampled some tokens."""
        updates = self.config.algorithm.updates_per_rollout
        versions = [v for c in completions for v in (c.policy_version, *c.token_versions[-1:].tolist())]
        return min(versions) // updates, max(versions) // updates

    def _left_out(self) -> list[Key]:
        """The groups that the checkpoint's file does not hold, which begin anew or come out of the bank."""
        keys = {*self.buffer.keys(State.UNDER_WAY), *self.buffer.keys(State.IN_HAND)}
        return sorted(keys - set(self._in_hand))

    def _is_found(self, step: int, record: bytes) -> bool:
        (name,) = pending.prompt_ids(record)
        return any(self.prompts(of)[i].id == name for of, i in self._found if of == step)
