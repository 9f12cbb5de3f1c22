"""Some of each training step's rollouts, kept for people.

<run.dir>/rollouts/train_000050.jsonl         one JSON object a completion
<run.dir>/rollouts/train_000050.safetensors   their tokens, one completion after the other (``rollout.keep_tokens``)

Which groups are kept is decided by the seed, so that every layout keeps the same. Rank 0 writes in the background, and
what it can't write is a warning: it ends no run.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors.numpy import save

from nemo_aapo.algorithms.advantage import group_advantage
from nemo_aapo.config import Config
from nemo_aapo.config.schema import AlgorithmConfig
from nemo_aapo.distributed import parallel
from nemo_aapo.rollout.spread import own_shard
from nemo_aapo.run.experiment import rollout_rows
from nemo_aapo.run.names import ROLLOUTS, kept_name, step_of
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Completion, Group
from nemo_aapo.utils.background import BestEffort
from nemo_aapo.utils.files import to_json, write_atomic

if TYPE_CHECKING:
    from nemo_aapo.learner.learner import Learner

ROWS, TOKENS = ".jsonl", ".safetensors"
_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Tokenizers decode a part of a character to this one."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptGroup:
    """One group as it is sent to rank 0 and written there."""

    rows: list[dict[str, Any]]
    """What is written of each completion."""
    tokens: list[dict[str, np.ndarray]]
    """Of each completion: ``token_ids`` int32 [T]; float32 [T] ``logprobs`` (the engine's), ``learner_logprobs`` and
    ``entropy``. Empty unless tokens are kept."""


class KeptRollouts:
    """Chooses and writes them; ``choose`` is collective."""

    def __init__(
        self, config: Config, learner: Learner, decode: Callable[[np.ndarray], str], note: Callable[[str], None]
    ) -> None:
        """
        Args:
            learner: gives log-probs and entropies of tokens that are kept.
            decode: token ids -> text.
            note: takes a line for people.
        """
        self.config, self.learner = config, learner
        self._job = BestEffort("kept rollouts", note)
        self._files = KeptFiles(Path(config.run.dir) / ROLLOUTS, config.rollout.keep_bytes, decode)

    def choose(self, step: int, groups: Sequence[Group]) -> list[KeptGroup]:
        """What this rank has of the groups that are kept, before the policy learns from them.

        Args:
            step: counted from 0.
            groups: this data-parallel rank's, with advantages.
        """
        count, first = self.config.prompts_per_step, own_shard(self.config.prompts_per_step).start
        chosen = chosen_groups(self.config.seed, step, count, self.config.rollout.keep_groups)
        mine = [(index, groups[index - first]) for index in chosen if first <= index < first + len(groups)]
        figures: dict[int, np.ndarray] = {}
        if self.config.rollout.keep_tokens:
            starts = [index * self.config.group_size for index, _ in mine]
            figures = self.learner.token_figures([group for _, group in mine], starts)
        if not parallel.is_model_parallel_source():  # which alone has the texts
            return []
        return [
            KeptGroup(
                _rows(step + 1, index, group, self.config.algorithm),
                _tokens(group, index * self.config.group_size, figures),
            )
            for index, group in mine
        ]

    def write(self, step: int, kept: Sequence[KeptGroup]) -> None:
        """Have them written in the background, on rank 0; returns at once.

        Args:
            step: counted from 1.
            kept: all ranks', in the order of the step's groups.
        """
        if parallel.rank() == 0 and kept:
            self._job.start(f"rollouts of step {step}", lambda: self._files.write(step, kept))

    def wait(self) -> None:
        """Return when all is written: a checkpoint comes after what was kept of its step."""
        self._job.wait()


def chosen_groups(seed: int, step: int, groups: int, keep: int | Literal["all"]) -> list[int]:
    """Which of a step's groups are kept, in their order: the same on every layout.

    >>> chosen_groups(1234, 0, 4, "all"), len(chosen_groups(1234, 0, 32, 2))
    ([0, 1, 2, 3], 2)
    """
    if keep == "all" or keep >= groups:
        return list(range(groups))
    order = np.random.default_rng(stream_seed(seed, "kept", step)).permutation(groups)
    return sorted(int(index) for index in order[:keep])


def _rows(step: int, index: int, group: Group, algorithm: AlgorithmConfig) -> list[dict[str, Any]]:
    own = group.final_advantages  # all of it, where there is no margin
    if algorithm.margin is not None:
        own = group_advantage(group.rewards[None], algorithm.scale_rewards)[0]
    more = {"step": step, "group": index, "prompt_id": group.prompt.id, "reference_rewards": group.reference_rewards}
    return [
        {
            **row,
            **more,
            "sample": i,
            "failed": group.failed[i],
            "group_advantage": own[i],
            "margin": group.final_advantages[i] - own[i],
            "policy_version": group.completions[i].policy_version,
            **_versions(group.completions[i]),
        }
        for i, row in enumerate(rollout_rows([group]))
    ]


def _versions(completion: Completion) -> dict[str, Any]:
    """How many tokens each version sampled, [[version, tokens], ...], where there are several."""
    if completion.versions is None:
        return {}
    versions, counts = np.unique(completion.versions, return_counts=True)
    return {"versions": [[int(version), int(count)] for version, count in zip(versions, counts, strict=True)]}


def _tokens(group: Group, first: int, figures: dict[int, np.ndarray]) -> list[dict[str, np.ndarray]]:
    if not figures:
        return []
    nothing = np.zeros((2, 0), np.float32)  # an empty completion has no tokens to compute anything of
    return [
        {
            "token_ids": np.asarray(completion.token_ids, np.int32),
            "logprobs": np.asarray(completion.logprobs, np.float32),
            "learner_logprobs": figures.get(first + i, nothing)[0],
            "entropy": figures.get(first + i, nothing)[1],
        }
        for i, completion in enumerate(group.completions)
    ]


# ---------------------------------------------------------------- files


class KeptFiles:
    """The files of kept rollouts in one directory, which together take no more than a number of bytes."""

    def __init__(self, directory: Path, limit: int, decode: Callable[[np.ndarray], str]) -> None:
        self.directory, self.limit, self.decode = directory, limit, decode
        self._pieces: dict[int, str] = {}  # token id -> its text
        self._sizes: dict[int, int] | None = None  # step -> bytes of its files; None: not looked yet

    def write(self, step: int, kept: Sequence[KeptGroup]) -> None:
        """Write a step's groups, as many as the limit has room for at all, then make room.

        Raises:
            OSError: they can't be written.
        """
        if self._sizes is None:
            self._sizes = dict(self._present())
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        while kept:
            lines = "".join(to_json({**row, "time": now}) + "\n" for group in kept for row in group.rows).encode()
            tokens = self._packed(kept)
            if len(lines) + len(tokens) <= self.limit:
                break
            kept = kept[:-1]
        else:
            return
        if tokens:  # before the lines, by which a reader knows that there is something
            write_atomic(self.directory / f"{kept_name(step)}{TOKENS}", tokens)
        write_atomic(self.directory / f"{kept_name(step)}{ROWS}", lines)
        self._sizes[step] = len(lines) + len(tokens)
        for gone in thinned(self._sizes, self.limit):
            for ending in (ROWS, TOKENS):
                (self.directory / f"{kept_name(gone)}{ending}").unlink(missing_ok=True)
            del self._sizes[gone]

    def _present(self) -> Iterator[tuple[int, int]]:
        found: dict[int, int] = {}
        for path in self.directory.glob("train_*"):
            if (step := step_of(path.stem, "train")) is not None:
                found[step] = found.get(step, 0) + path.stat().st_size
        return iter(found.items())

    def _packed(self, kept: Sequence[KeptGroup]) -> bytes:
        """The tokens of all completions, in the order of the lines; empty without."""
        each = [tokens for group in kept for tokens in group.tokens]
        if not each:
            return b""
        texts = [row["completion"] for group in kept for row in group.rows]
        ends = [text_ends([self._piece(int(i)) for i in t["token_ids"]], s) for t, s in zip(each, texts, strict=True)]
        return save(
            {
                "lengths": np.array([len(tokens["token_ids"]) for tokens in each], np.int32),
                "text_ends": np.concatenate(ends),
                **{name: np.concatenate([tokens[name] for tokens in each]) for name in each[0]},
            }
        )

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.decode(np.array([token]))
        return self._pieces[token]


def thinned(sizes: dict[int, int], limit: int) -> list[int]:
    """The steps that have to go so that the rest takes no more than ``limit`` bytes.

    Every second one of the older half goes, as often as it takes: the whole run stays in sight, its past ever sparser.

    >>> thinned(dict.fromkeys(range(1, 9), 10), 60)
    [1, 3]
    """
    left, gone = sorted(sizes), []
    while left and sum(sizes[step] for step in left) > limit:
        gone += (older := left[: max(1, len(left) // 2)][::2])
        left = [step for step in left if step not in older]
    return gone


def text_ends(pieces: Sequence[str], text: str) -> np.ndarray:
    """Where each token's part of a completion's text ends, in characters.

    Args:
        pieces: the text of each token when it is decoded alone, which is not always its part: a character may be spread
            over tokens, and a leading space be lost.
        text: the completion's.

    Returns:
        int32 [T]; a token without text of its own ends where the one before it does, and the last ends with the text.
    """
    ends, place, waiting = np.zeros(len(pieces), np.int32), 0, 0
    for i, piece in enumerate(pieces):
        found = (
            -1 if not piece or _CUT_CHARACTER in piece else text.find(piece, place, place + len(piece) + waiting + 1)
        )
        if found >= 0:
            if i:
                ends[i - 1] = found if waiting else ends[i - 1]
            place, waiting = found + len(piece), 0
        else:
            waiting += 1
        ends[i] = place
    if len(ends):
        ends[-1] = len(text)
    return ends
