"""Which prompts a step takes, from one source or from several mixed by weight.

A pure function of the step where sampling is uniform. Where it goes by accuracy, what came of earlier steps decides
too: the trainer reports it (``observe``), and it is part of each checkpoint.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_aapo.data.streams import DifficultyStream, EndlessStream, PermutedStream, Sampling, Stream
from nemo_aapo.errors import DataError
from nemo_aapo.seeds import stream_seed


class PromptSampler:
    """Goes through each source epoch by epoch, ``prompts_per_step`` prompts at a time from all of them together.

    No step holds a prompt twice. What the steps ahead will take can be asked for as far as it is decided, which is how
    reference rewards are filled for exactly the prompts that a run uses.
    """

    def __init__(
        self,
        num_prompts: int | None,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
        data_digest: str = "",
        *,
        sampling: Sampling = "uniform",
        shares: Sequence[tuple[int | None, float]] = (),
    ) -> None:
        """Args:
            num_prompts: prompts in the data set; None: it has no end.
            prompts_per_step: prompts that one step takes.
            seed: 0 <= seed < 2**63; with the epoch's number it names the permutation.
            shuffle: False takes the prompts in the file's order.
            data_digest: ``PromptSet.digest``, so that a checkpoint is not resumed on other data.
            sampling: how prompts are drawn after a source's first epoch.
            shares: ``PromptSet.shares``; by default one source.

        Raises:
            ValueError: a size below 1, or a seed out of range.
            DataError: fewer prompts than a step takes.
        """
        shares = list(shares) or [(num_prompts, 1.0)]
        if any(size is not None and size < 1 for size, _ in shares) or prompts_per_step < 1:
            raise ValueError(
                f"num_prompts ({num_prompts}) and prompts_per_step ({prompts_per_step}) must be at least 1"
            )
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.data_digest = data_digest
        self.sampling = sampling
        self.step = 0
        """The next step to take: the trainer moves it on, ``state_dict`` keeps it."""
        self._shares = shares
        self._counts: list[tuple[int, ...]] = [(0,) * len(shares)]  # positions of each source before each step
        self._check_sizes()
        self._layout = PromptLayout([size for size, _ in shares])
        self._streams = [self._stream(k) for k in range(len(shares))]

    def indices(self, step: int) -> list[int]:
        """The indices of the prompts of a step (from 0), all different; see ``PromptLayout``.

        Raises:
            ValueError: a step below 0, or one that is not decided yet.
        """
        taken = []
        for k, (start, stop) in enumerate(self._spans(step)):
            indices = self._streams[k].take(start, stop) if stop > start else []
            # Sources are spread over the step, as its neighbours go to one data-parallel rank.
            taken += [((i + 0.5) / len(indices), k, self._layout.index(k, n)) for i, n in enumerate(indices)]
        return [index for _, _, index in sorted(taken)] if len(self._streams) > 1 else [index for *_, index in taken]

    def knows(self, step: int) -> bool:
        """Whether a step's prompts are decided: from the first step of an epoch on, those of the epoch are."""
        return all(self._streams[k].knows(start) for k, (start, _) in enumerate(self._spans(step)))

    def observe(self, step: int, results: Mapping[int, tuple[int, int]]) -> None:
        """Take in what came of a step; called once a step, in order, alike on all ranks.

        Args:
            results: index of each prompt of the step -> (right completions, completions that could be judged).
        """
        parts: list[list[tuple[int, int, int]]] = [[] for _ in self._streams]
        for index, (right, total) in results.items():
            k, n = self._layout.place(index)
            parts[k].append((n, right, total))
        for stream, (start, stop), part in zip(self._streams, self._spans(step), parts, strict=True):
            stream.observe(start, stop, part)

    @property
    def observes(self) -> bool:
        """Whether ``observe`` has an effect."""
        return self.sampling != "uniform"

    def epochs(self, step: int) -> float:
        """How often the steps before this one took a prompt of a source that has an end, on average over those."""
        sizes = [size for size, _ in self._shares]
        taken = sum(count for count, size in zip(self._before(step), sizes, strict=True) if size is not None)
        return taken / max(sum(size for size in sizes if size is not None), 1)

    # ---------------------------------------------------------------- sources

    def _spans(self, step: int) -> list[tuple[int, int]]:
        """(start, stop) of each source's positions in a step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        return list(zip(self._before(step), self._before(step + 1), strict=True))

    def _before(self, step: int) -> tuple[int, ...]:
        """Number of positions of each source that the steps before this one took."""
        if len(self._shares) == 1:
            return (step * self.prompts_per_step,)
        while len(self._counts) <= step:
            self._counts.append(self._next_counts(len(self._counts)))
        return self._counts[step]

    def _next_counts(self, steps: int) -> tuple[int, ...]:
        """Number of prompts that ``steps`` steps take from each source, as near to the weights as can be at each."""
        total = sum(weight for _, weight in self._shares)
        before = self._counts[-1]
        wanted = [weight / total * steps * self.prompts_per_step for _, weight in self._shares]
        counts = [max(int(want), had) for want, had in zip(wanted, before, strict=True)]
        by_need = sorted(range(len(counts)), key=lambda k: counts[k] - wanted[k])
        for k in by_need[: steps * self.prompts_per_step - sum(counts)]:
            counts[k] += 1
        for k in reversed(by_need):  # a source that was ahead of its share can make one too many
            excess = sum(counts) - steps * self.prompts_per_step
            counts[k] -= min(excess, counts[k] - before[k]) if excess > 0 else 0
        return tuple(counts)

    def _step_at(self, k: int, position: int) -> tuple[int, int]:
        if len(self._shares) == 1:
            start = position // self.prompts_per_step * self.prompts_per_step
            return start, start + self.prompts_per_step
        while self._counts[-1][k] <= position:
            self._before(len(self._counts))
        after = bisect.bisect_right(self._counts, position, key=lambda counts: counts[k])
        return self._counts[after - 1][k], self._counts[after][k]

    def _stream(self, k: int) -> Stream:
        size = self._shares[k][0]
        if size is None:
            return EndlessStream()
        seed = self.seed if len(self._shares) == 1 else stream_seed(self.seed, "source", k)
        permuted = PermutedStream(size, seed, self.shuffle, lambda position: self._step_at(k, position))
        return permuted if self.sampling == "uniform" else DifficultyStream(self.sampling, permuted, seed)

    def _check_sizes(self) -> None:
        total = sum(weight for _, weight in self._shares)
        for k, (size, weight) in enumerate(self._shares):
            most = self.prompts_per_step
            if len(self._shares) > 1:
                most = min(most, int(weight / total * self.prompts_per_step) + 2)
            if size is not None and size < most:
                which = f"source {k} of the mixture" if len(self._shares) > 1 else "the data set"
                raise DataError(
                    f"prompts_per_step is {self.prompts_per_step}, but {which} holds only {size} prompts where a step "
                    f"takes up to {most}: it would take one twice; lower prompts_per_step or add prompts"
                )

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The cursor, what was observed, and all that they depend on."""
        return {"step": self.step, "streams": [stream.state() for stream in self._streams], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the cursor.

        Raises:
            DataError: the state belongs to another order of prompts; every difference is named.
        """
        self.check(state)
        self.step = int(state["step"])
        for stream, saved in zip(self._streams, state["streams"], strict=True):
            stream.load(saved)

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that belongs to another order of prompts, or to other prompts.

        Raises:
            DataError: every difference is named.
        """
        wanted = self._identity()
        differences = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in wanted.items() if state.get(k) != v]
        if differences:
            raise DataError(
                f"can't resume the order of prompts: {'; '.join(differences)}; "
                "restore these settings and the data, or start a new run"
            )

    def _identity(self) -> dict[str, Any]:
        names = ("num_prompts", "prompts_per_step", "seed", "shuffle", "sampling", "data_digest")
        return {**{name: getattr(self, name) for name in names}, "shares": [list(share) for share in self._shares]}


class PromptLayout:
    """How the prompts of several sources are numbered.

    Those of sources that have an end come one source after the other; behind them, the n-th prompt of each source
    without end in turn.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._starts, total = {}, 0
        for k, size in enumerate(sizes):
            if size is not None:
                self._starts[k] = total
                total += size
        self._finite = total
        self._endless = [k for k, size in enumerate(sizes) if size is None]

    def index(self, k: int, n: int) -> int:
        """The index of prompt n of source k."""
        if k in self._starts:
            return self._starts[k] + n
        return self._finite + n * len(self._endless) + self._endless.index(k)

    def place(self, index: int) -> tuple[int, int]:
        """(k, n): the source k of an index, and the number n of the prompt in it."""
        if index >= self._finite:
            n, turn = divmod(index - self._finite, len(self._endless))
            return self._endless[turn], n
        k = max(k for k, start in self._starts.items() if start <= index)
        return k, index - self._starts[k]
