"""The in-process rollout engine: completions from the learner's own weights, on the learner's own ranks.

There is nothing to refit, on any tensor x pipeline layout, on CPU and GPU alike. Each
data-parallel rank generates for itself: no collective leaves the model-parallel group.

The ranks of a model-parallel group keep the same books (slots.py). What they learn of a step is one small broadcast
from the rank that draws: token ids and log-probs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import OnFinish, RolloutStats
from nemo_aapo.engines.megatron import sampling as sampler
from nemo_aapo.engines.megatron.cuda_graphs import DecodingGraphs, can_be_captured
from nemo_aapo.engines.megatron.decoder import Decoder, check_supported
from nemo_aapo.engines.megatron.scheduler import Admission, Slots, capacity
from nemo_aapo.engines.megatron.stop_strings import StopStrings
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.types import Completion, SamplingSpec


class MegatronEngine:
    """A ``RolloutEngine`` on an mcore GPTModel that lives in this process."""

    def __init__(
        self,
        model: GPTModel,
        vocab_size: int,
        max_concurrent_tokens: int,
        policy_version: int = 0,
        decode: Callable[[np.ndarray], str] | None = None,
    ) -> None:
        """
        Args:
            model: this rank's stage, unwrapped (no DDP). It is only borrowed during ``generate``.
            vocab_size: the tokenizer's; Megatron pads the model's, and padding is never drawn.
            max_concurrent_tokens: size of the KV cache in tokens; decides how many sequences run at a time.
            policy_version: of the weights that the model holds now.
            decode: token ids -> text, the same on all ranks; only stop strings need it.

        Raises:
            ValueError: the model's attention is of a kind that the engine doesn't know.
        """
        check_supported(model)
        self.model = model
        self.vocab_size = vocab_size
        self.max_concurrent_tokens = max_concurrent_tokens
        self.policy_version = policy_version
        self.decode = decode
        self.shares_weights = True
        self.stats: RolloutStats | None = None
        self._stop_strings: StopStrings | None = None  # kept, as it learns what each token says
        self.group = parallel.groups().model
        ranks = dist.get_process_group_ranks(self.group)
        self.group_size = len(ranks)
        # Tensor ranks are neighbours: the last pipeline stage's are the last of the group, and its first one draws.
        self.drawing_rank = ranks[-parallel.tensor_parallel_size()]
        self.draws = dist.get_rank() == self.drawing_rank
        self.cuda_graphs = self.group_size == 1 and can_be_captured(model)
        """Steps without a prefill are CUDA graphs (decoding_graphs.py). False: kernel by kernel, for comparisons."""
        self.graphs: DecodingGraphs | None = None
        """Of the last ``generate`` call, with its KV cache; kept for the next one until ``sleep``."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``.

        Raises:
            ValueError: an empty prompt, ``seeds`` of another length than ``prompts``, a stop token outside the
                vocabulary, stop strings that are empty or that nothing here can decode, a sequence that may outgrow
                ``max_concurrent_tokens``.
            FloatingPointError: the model gave log-probs that are not finite.
        """
        self._check(prompts, sampling, seeds)
        began = time.perf_counter()
        rollout = _Rollout(self, prompts, sampling, seeds, on_finish)
        with torch.inference_mode():
            while rollout.step():
                pass
        self.graphs = rollout.graphs  # only if all went well: an overflow may have left NaN in the cache
        self.stats = rollout.stats(time.perf_counter() - began)
        return rollout.completions

    def _check(self, prompts: Sequence[np.ndarray], sampling: SamplingSpec, seeds: Sequence[Sequence[int]]) -> None:
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but seeds for {len(seeds)}")
        empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty:
            raise ValueError(f"prompt {empty[0]} has no tokens: nothing to condition the first token on")
        outside = [token for token in sampling.stop_token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"stop token {outside[0]} lies outside the vocabulary of {self.vocab_size}")

    def stop_strings(self, sampling: SamplingSpec) -> StopStrings | None:
        """What looks for the spec's stop strings; None if it has none."""
        if not sampling.stop_strings:
            return None
        if self.decode is None:
            raise ValueError(f"stop_strings {list(sampling.stop_strings)}: the engine was made without ``decode``")
        if self._stop_strings is None or self._stop_strings.strings != sampling.stop_strings:
            self._stop_strings = StopStrings(sampling.stop_strings, self.decode, self.vocab_size)
        return self._stop_strings

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the version. The weights are the learner's own, hence new already; ``named_tensors`` stays unread."""
        self.policy_version = version

    def sleep(self) -> None:
        """Give back the KV cache and the graphs, where CUDA graphs keep them beyond a ``generate`` call."""
        self.graphs = None

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Let go of the model."""
        self.graphs = None
        del self.model


class _Rollout:
    """One ``generate`` call: its books, its cache, and what has come out so far."""

    def __init__(
        self,
        engine: MegatronEngine,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None,
    ) -> None:
        self._engine, self._model, self._prompts = engine, engine.model, prompts
        self._sampling, self._on_finish = sampling, on_finish
        self.completions: list[list[Completion]] = [[None] * len(row) for row in seeds]
        length = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
        rows = capacity(engine.max_concurrent_tokens, length, sequences=sum(map(len, seeds)))
        self._slots = Slots(prompts, seeds, sampling.max_new_tokens, rows)
        self._decoder = Decoder(engine.model, copy=_copy_pays(engine.model, rows, sampling.max_new_tokens))
        self.graphs = self._reusable_graphs(rows, length)
        self._cache = self.graphs.cache if self.graphs else self._decoder.new_cache(rows, length)
        if self.graphs is None and engine.cuda_graphs and rows:
            self.graphs = DecodingGraphs(self._decoder, self._cache, sampling, engine.vocab_size)
        self._is_stop = np.zeros(engine.vocab_size, dtype=bool)
        self._is_stop[list(sampling.stop_token_ids)] = True
        self._stop_strings = engine.stop_strings(sampling)
        self._steps = self._idle = 0

    def _reusable_graphs(self, rows: int, length: int) -> DecodingGraphs | None:
        """The last call's graphs, with its cache, if they suit this one. Otherwise its memory is given back first."""
        engine = self._engine
        kept, engine.graphs = engine.graphs, None
        if kept and engine.cuda_graphs and kept.fits(self._decoder, rows, length, self._sampling, engine.vocab_size):
            return kept
        return None

    def step(self) -> bool:
        """Let sequences in, draw a token for each row, let finished ones out; False when there was nothing to do."""
        slots, cache = self._slots, self._cache
        entered = slots.admit()
        if not slots.live:
            return False
        fresh = [admission for admission in entered if admission.prefill]
        for admission in entered[: len(entered) - len(fresh)]:
            cache.restore(admission.start, admission.stop)
        decoding_rows = fresh[0].start if fresh else slots.live
        if self.graphs and not fresh:
            drawn = self.graphs.step(slots)
        else:
            logits = self._forward(decoding_rows, fresh)
            if fresh and fresh[-1].keep:
                cache.keep(fresh[-1].start, len(self._prompts[fresh[-1].prompt]))
            drawn = self._draw(logits)
        tokens, logprobs = self._finite(drawn)
        slots.record(tokens, logprobs, decoding_rows)
        self._steps, self._idle = self._steps + 1, self._idle + slots.rows - slots.live
        self._let_out(self._stopped(tokens))
        return True

    def _stopped(self, tokens: np.ndarray) -> np.ndarray:
        """bool [live], which rows the new tokens [live] end by what they say."""
        slots, live = self._slots, slice(self._slots.live)
        stopped = self._is_stop[tokens]
        if self._stop_strings is not None:
            long_enough = slots.drawn[live] >= self._sampling.min_new_tokens
            stopped = stopped | self._stop_strings.found(slots.tokens[live], slots.drawn[live], tokens) & long_enough
        return stopped

    def _forward(self, decoding_rows: int, fresh: Sequence[Admission]) -> torch.Tensor | None:
        """One pass over all live rows: logits [live, padded vocabulary] on the last stage, None on the others."""
        slots, model, decoder = self._slots, self._model, self._decoder
        pipeline = parallel.groups().pipeline
        prompts = [self._prompts[admission.prompt] for admission in fresh]
        shares = [admission.stop - admission.start for admission in fresh]
        decode = slice(decoding_rows)
        tokens = self._cache.begin(slots.token[decode], slots.length[decode], prompts, shares)
        if model.pre_process:
            hidden = decoder.embed(tokens)
        else:
            hidden = self._cache.kv.new_empty(len(tokens), model.config.hidden_size)
            dist.recv(hidden, parallel.rank_of_neighbour_stage(-1), group=pipeline)
        hidden = decoder.layers(hidden, self._cache)
        if model.post_process:
            return decoder.logits(hidden)
        dist.send(hidden, parallel.rank_of_neighbour_stage(1), group=pipeline)
        return None

    def _draw(self, logits: torch.Tensor | None) -> np.ndarray:
        """Tokens and log-probs of this step, float64 [2, live], the same on every rank of the group."""
        slots, engine = self._slots, self._engine
        # float64 holds token ids and float32 numbers alike, so that one broadcast carries both
        drawn = torch.empty(2, slots.live, dtype=torch.float64, device=self._cache.kv.device)
        if engine.draws:
            seeds, steps = (
                torch.from_numpy(column[: slots.live]).to(logits.device) for column in (slots.seed, slots.drawn)
            )
            drawn[0], drawn[1] = sampler.draw(logits, self._sampling, seeds, steps, engine.vocab_size)
        if engine.group_size > 1:
            dist.broadcast(drawn, engine.drawing_rank, group=engine.group)
        return drawn.cpu().numpy()

    def _finite(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 and log-probs of float64 [2, live]."""
        tokens, logprobs = drawn
        if not np.isfinite(logprobs).all():
            raise FloatingPointError(
                f"policy version {self._engine.policy_version} gives log-probs that are not finite: the weights or the "
                "activations have overflowed. Look at grad_norm and the learning rate of the steps before"
            )
        return tokens.astype(np.int64), logprobs

    def _let_out(self, stopped: np.ndarray) -> None:
        """Hand over the sequences that ended, and close the gaps that they leave."""
        slots = self._slots
        done = np.flatnonzero(stopped | (slots.drawn[: slots.live] == self._sampling.max_new_tokens))
        for row in done:
            i, j, length = slots.prompt[row], slots.completion[row], slots.drawn[row]
            completion = Completion(
                token_ids=slots.tokens[row, :length].copy(),
                logprobs=slots.logprobs[row, :length].copy(),
                finish_reason="stop" if stopped[row] else "length",
                policy_version=self._engine.policy_version,
            )
            self.completions[i][j] = completion
            if self._on_finish:
                self._on_finish(int(i), int(j), completion)
        source, target = slots.retire(done)
        if len(target):
            self._cache.move(source, target, int(slots.length[target].max()))

    def stats(self, seconds: float) -> RolloutStats:
        """Figures of the whole call."""
        lengths = [len(completion.token_ids) for group in self.completions for completion in group]
        return RolloutStats(
            tokens=sum(lengths),
            seconds=seconds,
            steps=self._steps,
            tail_factor=max(lengths) * len(lengths) / sum(lengths) if lengths else 1.0,
            idle_fraction=self._idle / (self._steps * self._slots.rows) if lengths else 0.0,
        )


def _copy_pays(model: GPTModel, rows: int, new_tokens: int) -> bool:
    """Whether a rollout of so many rows and new tokens is worth a copy of the large weights (products.py).

    The copy takes about as long as two decoding steps of 32 rows, and each step then gains about a tenth. A rollout
    that might have been long but stops at its first tokens loses those two steps.
    """
    weight = next(model.parameters())
    return not weight.is_cuda and weight.dtype == torch.float32 and rows >= 4 and new_tokens >= 32
