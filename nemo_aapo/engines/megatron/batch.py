"""The sequences of one ``generate`` call of the in-process engine, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.base import InFlight, OnFinish, RolloutStats
from nemo_aapo.engines.elsewhere import arranged
from nemo_aapo.engines.megatron.cuda_graphs import DecodingGraphs
from nemo_aapo.engines.megatron.decoder import Decoder
from nemo_aapo.engines.megatron.experts.lockstep import Lockstep
from nemo_aapo.engines.megatron.experts.routes import RouteRecorder
from nemo_aapo.engines.megatron.matmul import packing_pays
from nemo_aapo.engines.megatron.sampling import finite, sample
from nemo_aapo.engines.megatron.scheduler import (
    MAX_PREFILL_TOKENS,
    Admission,
    Scheduler,
    TokenVersions,
    capacity,
    contents,
)
from nemo_aapo.engines.megatron.speculation import Feed, Speculation, plain
from nemo_aapo.engines.megatron.stop_strings import StopStrings
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.trace import spans
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.buckets import buckets


class Host(Protocol):
    """What a call needs of its engine, ``MegatronEngine``, where each is described."""

    model: GPTModel
    vocab_size: int
    max_concurrent_tokens: int
    policy_version: int
    record_routes: bool
    speculation: bool
    cuda_graphs: bool
    graphs: DecodingGraphs | None
    group: dist.ProcessGroup
    group_size: int
    sampling_rank: int
    is_sampling_rank: bool

    def stop_strings(self, sampling: SamplingSpec) -> StopStrings | None: ...


class Batch:
    """The sequences of one ``generate`` call: their scheduler, their KV cache, and the finished completions."""

    def __init__(
        self,
        engine: Host,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None,
        lockstep: Lockstep | None,
        in_flight: InFlight | None = None,
    ) -> None:
        self._engine, self._model = engine, engine.model
        self._sampling, self._on_finish = sampling, on_finish
        self._seeds, self._lockstep, self._in_flight = seeds, lockstep, in_flight
        self._versions = TokenVersions()
        self._finished: dict[tuple[int, int], Completion] = {}
        longest = in_flight.prompt_tokens if in_flight else max((len(prompt) for prompt in prompts), default=0)
        length, sequences = longest + sampling.max_new_tokens, sum(map(len, seeds))
        rows = capacity(
            engine.max_concurrent_tokens, length, sequences=engine.max_concurrent_tokens if in_flight else sequences
        )
        self.scheduler = Scheduler(prompts, seeds, sampling.max_new_tokens, rows)
        self._pack = packing_pays(next(engine.model.parameters()), rows, sampling.max_new_tokens)
        self._decoder = Decoder(engine.model, self._pack, lockstep)
        self.graphs = self._reusable_graphs(rows, length)
        self._cache = self.graphs.cache if self.graphs else self._decoder.new_cache(rows, length)
        if self.graphs is None and engine.cuda_graphs and rows:
            self.graphs = DecodingGraphs(self._decoder, self._cache, sampling, engine.vocab_size)
        self._is_stop = np.zeros(engine.vocab_size, dtype=bool)
        self._is_stop[list(sampling.stop_token_ids)] = True
        self._stop_strings = engine.stop_strings(sampling)
        layers, per_token = len(self._model.decoder.layers), self._model.config.moe_router_topk
        self._routes = RouteRecorder(self.scheduler, layers, per_token) if engine.record_routes else None
        self._speculation = None
        # A graph feeds one token of each row; in flight, prompts come that a table of guesses was not made for.
        if engine.speculation and self.graphs is None and in_flight is None:
            self._speculation = Speculation(self.scheduler, prompts, [len(row) for row in seeds], engine.vocab_size)
        self._chosen: list[torch.Tensor] = []  # the experts of the last pass, layer by layer
        self._steps = self._idle = 0
        self._asked_to_end = False  # by this rank's on_finish
        self._ends = False  # the same of the sampling rank, a step later, which all ranks of the group follow

    def _reusable_graphs(self, rows: int, length: int) -> DecodingGraphs | None:
        """The last call's graphs, with its cache, if they suit this call. Otherwise their memory is freed."""
        engine = self._engine
        kept, engine.graphs = engine.graphs, None
        if kept and engine.cuda_graphs and kept.fits(self._decoder, rows, length, self._sampling, engine.vocab_size):
            return kept
        return None

    def step(self) -> bool:
        """Admit sequences, sample a token of each running one, retire the finished; False when none was left."""
        scheduler, cache = self.scheduler, self._cache
        admitted = scheduler.admit()
        if not scheduler.running or self._ends:
            return False
        prefills = [admission for admission in admitted if admission.prefill]
        for admission in admitted[: len(admitted) - len(prefills)]:
            cache.restore(admission.start, admission.stop)
        decoding_rows = prefills[0].start if prefills else scheduler.running
        feed = self._speculation.feed(decoding_rows) if self._speculation else plain(scheduler, decoding_rows)
        prompt_lengths = [len(self.scheduler.prompts[admission.prompt]) for admission in prefills]
        if self._lockstep:
            self._lockstep.begin_step(len(feed.tokens) + sum(prompt_lengths), len(feed.rows))
        if self.graphs and not prefills:
            sampled = self.graphs.step(scheduler)
        else:
            logits = self._forward(feed, prefills)
            if prefills and prefills[-1].keep:
                cache.keep(prefills[-1].start, prompt_lengths[-1])
            sampled = self._sample(logits, feed)
        accepted = feed.accepted(sampled[0])
        if self._routes is not None:  # not within the pass: stages wait for one another in it
            self._routes.record(self._chosen, feed, accepted, prefills, prompt_lengths)
        if self._lockstep:
            self._lockstep.end_step()
        stopped = self._take(feed, accepted, *finite(sampled, self._engine.policy_version))
        if spans.recorder is not None:
            spans.recorder.sample("rows", live=scheduler.running, waiting=scheduler.waiting)
        self._steps, self._idle = self._steps + 1, self._idle + scheduler.rows - scheduler.running
        self._retire(stopped)
        return True

    def _take(self, feed: Feed, accepted: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Append each row's accepted tokens, one after the other up to where it ends.

        Args:
            accepted: int64 [running], how many of its tokens each row gets. tokens, logprobs: [logits].

        Returns:
            bool [running], the rows that a stop token or stop string ends.
        """
        stopped = np.zeros(len(accepted), dtype=bool)
        for taken in range(int(accepted.max())):
            rows = np.flatnonzero((accepted > taken) & ~stopped)
            at = feed.at(rows, taken)
            self.scheduler.record(rows, tokens[at], logprobs[at], len(feed.drafts))
            stopped[rows] = self._stopped(rows, tokens[at])
            if self._speculation and taken:
                self._speculation.accepted += len(rows)
        return stopped

    def take_up(self) -> bool:
        """What comes between two steps of a call in flight: more prompts, other weights; False: it is to end."""
        assert self._in_flight is not None
        engine, scheduler, before = self._engine, self.scheduler, self._engine.policy_version
        with torch.inference_mode(False):
            more = self._in_flight.between()
        if more is None:
            return False
        if engine.policy_version != before:
            self._versions.changed(scheduler, before)
            scheduler.forget_kept()
            del self._decoder  # packed and merged weights are copies: the old ones go before the new ones come
            self._decoder = Decoder(self._model, self._pack)
            rows, length = self._cache.kv.shape[1:3]
            if self.graphs and not self.graphs.fits(self._decoder, rows, length, self._sampling, engine.vocab_size):
                self.graphs = DecodingGraphs(self._decoder, self._cache, self._sampling, engine.vocab_size)
            if self._in_flight.recompute_kv:
                self._recompute()
        scheduler.add(*more)
        return True

    def _recompute(self) -> None:
        """Keys and values of all running rows, by the weights that the model has now."""
        rows = [contents(self.scheduler, row) for row in range(self.scheduler.running)]
        longest, first = max(map(len, rows), default=0), 0
        for part in buckets(rows, lambda row: longest, MAX_PREFILL_TOKENS):
            nothing = np.zeros(0, np.int64)
            self._hidden(self._cache.begin(nothing, nothing, part, [1] * len(part), first_row=first))
            first += len(part)

    def lend(self) -> bool:
        """A step of the ranks in lockstep with this one, which has no sequences left; False: none of them has any."""
        if self._lockstep is None or not self._lockstep.begin_step(0, 0):
            return False
        self._decoder.lend_experts()
        self._lockstep.end_step()
        return True

    def _stopped(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool [n], which of the rows [n] a stop token or stop string ends; ``tokens`` [n] are their last ones."""
        scheduler = self.scheduler
        stopped = self._is_stop[tokens]
        if self._stop_strings is not None:
            lengths = scheduler.sampled[rows]
            found = self._stop_strings.found(scheduler.tokens[rows], lengths, tokens)
            stopped = stopped | found & (lengths >= self._sampling.min_new_tokens)
        return stopped

    def _forward(self, feed: Feed, prefills: Sequence[Admission]) -> torch.Tensor | None:
        """One pass over all running rows: logits [logits, padded vocabulary] on the last stage, None on the others."""
        prompts = [self.scheduler.prompts[admission.prompt] for admission in prefills]
        rows_per_prompt = [admission.stop - admission.start for admission in prefills]
        lengths = self.scheduler.length[: len(feed.drafts)]
        hidden = self._hidden(self._cache.begin(feed.tokens, lengths, prompts, rows_per_prompt, feed.drafts))
        return None if hidden is None else self._decoder.logits(hidden)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Pass tokens [T], laid out in the cache, through this stage: [rows, h] on the last one, None on the others."""
        model, decoder, pipeline = self._model, self._decoder, parallel.groups().pipeline
        if model.pre_process:
            hidden = decoder.embed(tokens)
        else:
            hidden = self._cache.kv.new_empty(len(tokens), model.config.hidden_size)
            dist.recv(hidden, parallel.rank_of_neighbour_stage(-1), group=pipeline)
        self._chosen.clear()
        hidden = decoder.layers(hidden, self._cache, None if self._routes is None else self._chosen)
        if model.post_process:
            return hidden
        dist.send(hidden, parallel.rank_of_neighbour_stage(1), group=pipeline)
        return None

    def _sample(self, logits: torch.Tensor | None, feed: Feed) -> np.ndarray:
        """Tokens and log-probs of this step, float64 [2, logits], the same on every rank of the group."""
        scheduler, engine = self.scheduler, self._engine
        # float64 holds token ids and float32 numbers alike, so that one broadcast carries both, and whether to end
        sampled = torch.empty(2, len(feed.rows) + 1, dtype=torch.float64, device=self._cache.kv.device)
        sampled[:, -1] = float(self._asked_to_end)
        if logits is not None and engine.is_sampling_rank:
            columns = (scheduler.seed[feed.rows], scheduler.sampled[feed.rows] + feed.offsets)
            seeds, steps = (torch.from_numpy(column).to(logits.device) for column in columns)
            sampled[0, :-1], sampled[1, :-1] = sample(logits, self._sampling, seeds, steps, engine.vocab_size)
        if engine.group_size > 1:
            dist.broadcast(sampled, engine.sampling_rank, group=engine.group)
        on_host = sampled.cpu().numpy()
        self._ends = bool(on_host[0, -1])
        return on_host[:, :-1]

    def _retire(self, stopped: np.ndarray) -> None:
        """Hand over the sequences that finished, and close the gaps that they leave."""
        scheduler = self.scheduler
        done = np.flatnonzero(stopped | (scheduler.sampled[: scheduler.running] == self._sampling.max_new_tokens))
        if self._speculation:
            self._speculation.learn(done)
        routes = self._routes.ended(done) if self._routes is not None and len(done) else [None] * len(done)
        for row, route in zip(done, routes, strict=True):
            i, j, length = int(scheduler.prompt[row]), int(scheduler.completion[row]), scheduler.sampled[row]
            first, versions = self._versions.ended(i, j, int(length), self._engine.policy_version)
            completion = Completion(
                token_ids=scheduler.tokens[row, :length].copy(),
                logprobs=scheduler.logprobs[row, :length].copy(),
                finish_reason="stop" if stopped[row] else "length",
                policy_version=first,
                routes=route,
                versions=versions,
            )
            if self._in_flight is None:  # else there may be many, and nobody asks for them all
                self._finished[i, j] = completion
            if self._on_finish and self._on_finish(i, j, completion):
                self._asked_to_end, self._ends = True, self._engine.group_size == 1
        source, target = scheduler.retire(done)
        if len(target):
            self._cache.move(source, target, int(scheduler.length[target].max()))
            if self._routes is not None:
                self._routes.move(source, target, int(scheduler.sampled[target].max()))

    def ordered(self) -> list[list[Completion]]:
        """All completions, ``[i][j]`` in the order of prompts and seeds, once ``step`` has returned False."""
        return arranged([(i, j, completion) for (i, j), completion in self._finished.items()], self._seeds)

    def stats(self, seconds: float) -> RolloutStats:
        """Figures of the whole call, which took so many seconds."""
        lengths = [len(completion.token_ids) for completion in self._finished.values()]
        return RolloutStats(
            tokens=sum(lengths),
            seconds=seconds,
            steps=self._steps,
            tail_factor=max(lengths) * len(lengths) / sum(lengths) if lengths else 1.0,
            idle_fraction=self._idle / (self._steps * self.scheduler.rows) if lengths else 0.0,
            drafted=self._speculation.drafted if self._speculation else 0,
            accepted=self._speculation.accepted if self._speculation else 0,
        )
