"""Decoding steps as CUDA graphs: embedding, layers, logits and sampling are one launch.

A decoding step of a small model is some three hundred kernels of a few microseconds. Launched one by one they cost the
host more time than the GPU needs for them; a captured graph replays them without the host. Graphs have fixed shapes and
addresses, so:

- the running rows are rounded up to one of a few numbers, with one graph each. A padding row is a free row of the cache
  with no tokens. It writes to its own position 0, which nothing reads before a prefill or ``restore`` overwrites it;
- attention reads each row up to its own length (``decode_triton``), so no graph depends on how long sequences are;
- what a step needs, and what comes out of it, passes through buffers that live as long as the graphs: one small copy
  to the GPU, one back, and one synchronisation a step.

Weights may change in place between steps. If they move, or the cache does, the graphs are worthless: ``fits``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nemo_aapo.engines.megatron.decoder import Decoder
from nemo_aapo.engines.megatron.kv_cache import KVCache
from nemo_aapo.engines.megatron.sampling import early_stops, sample
from nemo_aapo.engines.megatron.scheduler import Scheduler
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.types import SamplingSpec

SMALL_BATCHES = (16, 64)
"""Numbers of rows that have a graph; above them, the multiples of the last."""


def can_be_captured(model: GPTModel) -> bool:
    """True for a whole dense model on a GPU whose heads ``decode_triton`` takes: their size, turned whole, no window.

    The number of rows that each expert has comes to the host, which a graph can't wait for.
    """
    config, size = model.config, model.config.kv_channels
    if (
        config.num_moe_experts
        or config.window_size
        or config.layernorm_zero_centered_gamma
        or model.rotary_percent != 1
    ):
        return False
    return next(model.parameters()).is_cuda and size >= 16 and size & (size - 1) == 0


def padded_rows(running: int, rows: int) -> int:
    """Rows of the graph that serves ``running`` of the cache's ``rows`` rows."""
    step = SMALL_BATCHES[-1]
    return min(rows, next((size for size in SMALL_BATCHES if running <= size), -(-running // step) * step))


class DecodingGraphs:
    """The graphs of one model, cache and sampling spec, captured as they are needed. One rank, no collectives."""

    def __init__(self, decoder: Decoder, cache: KVCache, sampling: SamplingSpec, vocab_size: int) -> None:
        """
        Args:
            decoder: decodes the whole model, on a GPU.
            cache: its rows are this object's rows from now on.
            sampling: how tokens are sampled.
            vocab_size: the true vocabulary.
        """
        self.cache = cache
        self._decoder, self._sampling, self._vocab_size = decoder, sampling, vocab_size
        self._addresses = decoder.addresses()
        device, rows = cache.kv.device, cache.kv.shape[1]
        self._inputs = torch.zeros(4, rows, dtype=torch.int64, device=device)
        # float64 holds token ids and float32 numbers alike
        self._sampled = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self._staged_inputs, self._staged_sampled = (
            torch.zeros_like(buffer, device="cpu").pin_memory() for buffer in (self._inputs, self._sampled)
        )
        self._early_stops = early_stops(sampling, vocab_size, device)  # held, as the graphs know only its address
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def fits(self, decoder: Decoder, rows: int, length: int, sampling: SamplingSpec, vocab_size: int) -> bool:
        """True if the graphs may serve these weights, such a cache and this sampling spec."""
        mine = self._addresses, tuple(self.cache.kv.shape[1:3]), self._sampling, self._vocab_size
        return mine == (decoder.addresses(), (rows, length), sampling, vocab_size)

    @property
    def captured(self) -> int:
        """Number of graphs that exist."""
        return sum(graph is not None for graph in self._graphs.values())

    def step(self, scheduler: Scheduler) -> np.ndarray:
        """Feed each running row its token and sample the next one.

        Returns:
            float64 [2, running], tokens and log-probs; valid until the next call.
        """
        running, rows = scheduler.running, padded_rows(scheduler.running, scheduler.rows)
        staged = self._staged_inputs.numpy()
        staged[:, :running] = scheduler.inputs[:, :running]
        staged[:, running:rows] = 0
        self._inputs.copy_(self._staged_inputs, non_blocking=True)
        if rows not in self._graphs:
            # Not captured yet: this step runs kernel by kernel, which compiles and loads them all.
            self._compute(rows)
            self._graphs[rows] = None
        else:
            graph = self._graphs[rows]
            if graph is None:
                graph = self._graphs[rows] = self._capture(rows)
            graph.replay()
        self._staged_sampled.copy_(self._sampled, non_blocking=True)
        torch.cuda.current_stream(self._sampled.device).synchronize()
        return self._staged_sampled.numpy()[:, :running]

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        """Record ``_compute`` without running it. Graphs share one pool, as no two of them run at a time."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do with CUDA in the meantime, NCCL's watchdog above all, does no harm
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(rows)
        return graph

    def _compute(self, rows: int) -> None:
        """One step of rows ``0 .. rows-1``, from ``_inputs`` to ``_sampled``, all on the GPU."""
        seeds, lengths, tokens, steps = self._inputs[:, :rows]
        decoder = self._decoder
        hidden = decoder.layers(decoder.embed(tokens), _DecodingRows(self.cache, lengths))
        sampled = sample(decoder.logits(hidden), self._sampling, seeds, steps, self._vocab_size)
        for buffer, values in zip(self._sampled[:, :rows], sampled, strict=True):
            buffer.copy_(values)


class _DecodingRows:
    """The attention of rows that all decode, with lengths that only the GPU knows."""

    logits_at: Tensor | None = None

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self._cache, self._lengths = cache, lengths

    def attend(self, layer: int, mixed: Tensor) -> Tensor:
        """See ``KVCache.attend``."""
        return self._cache.attend_rows(layer, mixed, self._lengths)
