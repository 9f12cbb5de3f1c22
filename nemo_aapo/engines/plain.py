"""The plain rollout engine: each token comes from a whole forward pass of the learner's own modules.

It keeps no keys and values, so a completion of n tokens costs n passes over all that comes before them. For that it
knows nothing of a model's layers: it samples whatever trains. With the same sampler and the same random streams as the
megatron engine it draws the same tokens, but for near ties, and so tells whether that engine's decoder is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.engines.base import OnFinish, RolloutStats, check_request
from nemo_aapo.engines.elsewhere import Finished, arranged, stats_of
from nemo_aapo.engines.megatron.sampling import sample
from nemo_aapo.engines.megatron.stop_strings import StopStrings
from nemo_aapo.mcore import passes
from nemo_aapo.mcore.groups import gather_columns
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.model import GPTModel, output_weight
from nemo_aapo.types import Completion, FinishReason, SamplingSpec


class PlainEngine:
    """A ``RolloutEngine`` on an mcore GPTModel that lives in this process, on any tensor x pipeline layout."""

    def __init__(
        self,
        model: GPTModel,
        vocab_size: int,
        tokens_per_pass: int,
        policy_version: int = 0,
        decode: Callable[[np.ndarray], str] | None = None,
        multiple: int = 1,
    ) -> None:
        """
        Args:
            model: this rank's stage, unwrapped (no DDP). It is only read, and only during ``generate``.
            vocab_size: the tokenizer's; Megatron pads the model's, and padding is never sampled.
            tokens_per_pass: rows of a forward pass, padded to the longest, have at most so many tokens.
            policy_version: optimizer steps behind the weights that the model holds now.
            decode: token ids -> text, the same on all ranks; only stop strings need it.
            multiple: what the tokens of a row are padded to.
        """
        self.model, self.vocab_size, self.policy_version, self.decode = model, vocab_size, policy_version, decode
        self._tokens_per_pass, self._multiple = tokens_per_pass, multiple
        self.shares_weights = True
        self.stats: RolloutStats | None = None
        self.refit_bytes = 0
        self._group = parallel.groups().model
        # Tensor ranks are neighbours: the last pipeline stage's are the last of the group, and its first one samples.
        self._sampling_rank = dist.get_process_group_ranks(self._group)[-parallel.tensor_parallel_size()]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; arguments and result as in ``RolloutEngine.generate``.

        Raises:
            ValueError: as ``check_request``; or stop strings that nothing here can decode.
            FloatingPointError: the model gave log-probs that are not finite.
        """
        check_request(prompts, sampling, seeds, self.vocab_size)
        strings, began = self._stop_strings(sampling), time.perf_counter()
        running = [
            _Sequence(i, j, seed, prompts[i].astype(np.int64))
            for i, row in enumerate(seeds)
            for j, seed in enumerate(row)
        ]
        finished: Finished = []
        is_enough = False
        while running and (sampled := self._sample(running, sampling, is_enough)) is not None:
            for sequence, token, logprob in zip(running, *sampled, strict=True):
                sequence.tokens.append(int(token))
                sequence.logprobs.append(float(logprob))
            stopped = _stopped(running, sampling, strings)
            is_last = len(running[0].tokens) == sampling.max_new_tokens
            for sequence, has_stopped in zip(running, stopped, strict=True):
                if has_stopped or is_last:
                    completion = sequence.completion("stop" if has_stopped else "length", self.policy_version)
                    finished.append((sequence.i, sequence.j, completion))
                    is_enough |= bool(on_finish and on_finish(*finished[-1]))
            running = [] if is_last else [s for s, has_stopped in zip(running, stopped, strict=True) if not has_stopped]
        self.stats = stats_of(finished, time.perf_counter() - began)
        return arranged(finished, seeds)

    def _stop_strings(self, sampling: SamplingSpec) -> StopStrings | None:
        if not sampling.stop_strings:
            return None
        if self.decode is None:
            raise ValueError(f"stop_strings {list(sampling.stop_strings)}: the engine was made without ``decode``")
        return StopStrings(sampling.stop_strings, self.decode, self.vocab_size)

    def _sample(self, running: list[_Sequence], sampling: SamplingSpec, is_enough: bool) -> np.ndarray | None:
        """The next token of each sequence and its log-prob, float64 [2, running], the same on every rank of the group.

        Args:
            is_enough: this rank's ``on_finish`` said so; where the sampling rank's did, there is no next token: None.
        """
        sampled = torch.empty(2, len(running) + 1, dtype=torch.float64, device=device())  # holds token ids, too
        sampled[:, -1] = float(is_enough)
        logits = self._logits([sequence.ids for sequence in running])
        if logits is not None and dist.get_rank() == self._sampling_rank:
            seeds = torch.tensor([sequence.seed for sequence in running], device=logits.device)
            steps = torch.full_like(seeds, len(running[0].tokens))
            sampled[0, :-1], sampled[1, :-1] = sample(logits, sampling, seeds, steps, self.vocab_size)
        dist.broadcast(sampled, self._sampling_rank, group=self._group)
        on_host = sampled.cpu().numpy()
        if not np.isfinite(on_host).all():
            raise FloatingPointError(
                f"policy version {self.policy_version} gives log-probs that are not finite: the weights or the "
                "activations have overflowed. Look at grad_norm and the learning rate of the steps before"
            )
        return None if on_host[0, -1] else on_host[:, :-1]

    def _logits(self, rows: list[np.ndarray]) -> torch.Tensor | None:
        """Logits after the last token of each row, float32 [rows, padded vocabulary]; on the last stage, else None."""
        width = -(-max(map(len, rows)) // self._multiple) * self._multiple
        at_once = max(1, self._tokens_per_pass // width)
        batches = [_padded(rows[start : start + at_once], width) for start in range(0, len(rows), at_once)]

        def last_hidden(hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            whole = passes.whole_hidden(hidden, self.model.config.sequence_parallel)
            return whole.flatten(0, 1).index_select(0, batch.positions)

        found = passes.forward(self.model, batches, last_hidden)
        if not found:
            return None
        logits = F.linear(torch.cat(found).float(), output_weight(self.model).float())
        return gather_columns(logits)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the version. The weights are the learner's own, hence up to date; ``named_tensors`` stays unread."""
        self.policy_version = version

    def sleep(self) -> None:
        """Do nothing: nothing is held between calls."""

    def wake(self) -> None:
        """Do nothing, as ``sleep``."""

    def close(self) -> None:
        """Let go of the model."""
        del self.model


@dataclass(eq=False)
class _Sequence:
    """Completion j of prompt i, as far as it has come."""

    i: int
    j: int
    seed: int
    prompt: np.ndarray
    """int64 [P]"""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def ids(self) -> np.ndarray:
        """int64 [P + T]"""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int64)])

    def completion(self, reason: FinishReason, policy_version: int) -> Completion:
        return Completion(np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), reason, policy_version)


def _stopped(running: list[_Sequence], sampling: SamplingSpec, strings: StopStrings | None) -> np.ndarray:
    """bool [running], the sequences that their last token ended by a stop token or a stop string."""
    tokens = np.array([sequence.tokens for sequence in running], np.int32)
    last, length = tokens[:, -1], tokens.shape[1]
    stopped = np.isin(last, sampling.stop_token_ids)
    if strings is not None and length >= sampling.min_new_tokens:
        stopped |= strings.found(tokens, np.full(len(tokens), length), last)
    return stopped


def _padded(rows: list[np.ndarray], width: int) -> MicroBatch:
    """The rows, padded on the right, of which the place of each one's last token is asked for."""
    ids = np.zeros((len(rows), width), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lasts = (np.array([len(tokens) for tokens in rows]) - 1) * len(rows) + np.arange(len(rows))  # of [s, b] flattened
    where = device()
    nothing, none = torch.empty(0, device=where), torch.empty(0, dtype=torch.int64, device=where)
    return MicroBatch(
        input_ids=torch.from_numpy(ids).to(where),
        position_ids=torch.arange(width, device=where).expand(len(rows), width),
        cu_seqlens=None,
        longest=width,
        positions=torch.from_numpy(lasts).to(where),
        targets=none,
        lengths=(0,) * len(rows),
        advantages=nothing,
        weights=nothing,
        rollout_logprobs=nothing,
    )
