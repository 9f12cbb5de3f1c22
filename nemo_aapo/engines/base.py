"""The protocol of rollout engines. Whoever generates completions knows an engine by this page and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from nemo_aapo.types import Completion, SamplingSpec

OnFinish = Callable[[int, int, Completion], object]
"""Called as ``on_finish(i, j, completion)`` the moment completion j of prompt i is done. True in return: it is enough,
and the engine may break off the others."""


More = tuple[Sequence[np.ndarray], Sequence[Sequence[int]]]
"""Prompts and seeds, as ``RolloutEngine.generate`` takes them."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A call that goes on while weights change and more prompts come."""

    between: Callable[[], More | None]
    """Called between two decoding steps, on all ranks of the engine alike. It may load other weights into the model.
    What it returns is generated too, numbered behind the prompts so far; None: it is enough, and the call ends."""
    recompute_kv: bool
    """After other weights were loaded: True: keys and values of running sequences are computed anew by them. False:
    those that earlier weights left are gone on with."""
    prompt_tokens: int
    """No prompt that comes later is longer."""


@dataclass(frozen=True, slots=True)
class RolloutStats:
    """What one ``generate`` call did for this model-parallel group."""

    tokens: int
    """Completion tokens."""
    seconds: float
    """Wall-clock time."""
    steps: int
    """Forward passes; 0 where the engine can't tell."""
    tail_factor: float
    """Longest completion over the mean: how far stragglers stretch the rollout."""
    idle_fraction: float
    """Share of the rows that stood empty, averaged over the steps; NaN where the engine can't tell."""
    drafted: int = 0
    """Tokens that were guessed and fed before they were sampled; 0 where the engine does not or can't tell."""
    accepted: int = 0
    """How many of them were right, and are tokens of completions."""


@runtime_checkable
class ReportsServers(Protocol):
    """An engine whose work is done by servers, which are worth metrics of their own."""

    def server_metrics(self) -> dict[str, float]:
        """``servers/...`` of a step, on rank 0; empty elsewhere. Returns at once."""
        ...


class PendingCompletions(Protocol):
    """Completions that are being generated."""

    def result(self) -> list[list[Completion]]:
        """Wait for them; what ``generate`` would have returned. Collective over the model-parallel group."""
        ...

    def error(self) -> Exception | None:
        """What ended them before their end, on the model-parallel source rank; None so far. Returns at once."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates completions. All ranks of one model-parallel group call it alike and receive the same."""

    shares_weights: bool
    """True: it serves the learner's own weights. False: it has a copy, which ``update_weights`` replaces."""
    stats: RolloutStats | None
    """The last ``generate`` call's figures; None before the first."""
    refit_bytes: int
    """Bytes that the last ``update_weights`` wrote or sent; 0 where there was nothing to move."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Completions of each prompt.

        Args:
            prompts: int32 [P_i] token ids, P_i >= 1. Where not all sequences run at once, they enter in this order.
            sampling: temperature, lengths, stop tokens and stop strings.
            seeds: ``seeds[i][j]`` names the random stream of completion j of prompt i (0 <= seed < 2**63);
                ``len(seeds[i])`` completions are generated. The tokens of a completion depend on its prompt, its seed,
                the weights and the sampling spec, never on what else is in the batch.
            on_finish: told of each completion as it ends, on every rank, in the same order on every rank.

        Returns:
            ``out[i][j]``, in the order of ``prompts`` and ``seeds``. Once ``on_finish`` has said that it is enough, a
            row ends before its first completion that was broken off.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over weights, as (Hugging Face name, full tensor), and serve them as ``version``.

        An engine that shares the learner's own weights takes the version and leaves the iterable alone.
        """
        ...

    def sleep(self) -> None:
        """Give device memory (KV cache, own weights) back to the learner."""
        ...

    def wake(self) -> None:
        """Take it again."""
        ...

    def close(self) -> None:
        """Release everything; the engine can't be used afterwards."""
        ...


@runtime_checkable
class InFlightEngine(Protocol):
    """What an engine of a rollout server has besides that takes other weights and more prompts while it generates."""

    def generate_in_flight(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish,
        in_flight: InFlight,
    ) -> None:
        """Generate these prompts' completions and those of prompts that come meanwhile, until none is left.

        Completions go to ``on_finish`` alone. Those that began before weights changed go on by the new ones: their
        ``versions`` say which sampled which token, and each log-prob is that of the weights that sampled it.
        """
        ...


@runtime_checkable
class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that generates elsewhere while this process does something else: for ``rollout.async_depth`` and
    ``rollout.max_lag``."""

    def start(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> PendingCompletions:
        """As ``generate``, but returns at once.

        ``on_finish`` is called from another thread. Several calls may be under way: each keeps the weights that were
        served when it began, also where ``update_weights`` brings others meanwhile (with ``rollout.max_lag`` it goes on
        by those), and none waits for a later one. No collective is begun before ``result``.
        """
        ...


def check_request(
    prompts: Sequence[np.ndarray], sampling: SamplingSpec, seeds: Sequence[Sequence[int]], vocab_size: int
) -> None:
    """Refuse what no engine in this process can generate.

    Raises:
        ValueError: as ``check_prompts``; a stop token outside the vocabulary.
    """
    check_prompts(prompts, seeds)
    outside = [token for token in sampling.stop_token_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"stop token {outside[0]} lies outside the vocabulary of {vocab_size}")


def check_prompts(prompts: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> None:
    """Refuse what no engine can generate.

    Raises:
        ValueError: ``seeds`` of another length than ``prompts``, an empty prompt.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but seeds for {len(seeds)}")
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens: nothing to condition the first token on")
