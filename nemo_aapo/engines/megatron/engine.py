"""The in-process rollout engine: completions from the learner's own weights, on the learner's own ranks.

There is nothing to refit, on any tensor x pipeline layout, on CPU and GPU alike. Each data-parallel rank generates for
itself: no collective leaves the model-parallel group. Only where experts are spread over more than the tensor-parallel
ranks, the ranks that share them decode in step (``experts/lockstep.py``).

Every rank of a model-parallel group runs the same scheduler. To keep in step they need one small broadcast in each
decoding step, of token ids and log-probs from the rank that samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist

from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.engines.base import InFlight, OnFinish, RolloutStats, check_request
from nemo_aapo.engines.megatron.batch import Batch
from nemo_aapo.engines.megatron.cuda_graphs import DecodingGraphs, can_be_captured
from nemo_aapo.engines.megatron.decoder import check_supported
from nemo_aapo.engines.megatron.experts.lockstep import Lockstep, decodes_in_step
from nemo_aapo.engines.megatron.scheduler import Scheduler
from nemo_aapo.engines.megatron.stop_strings import StopStrings
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.types import NO_ROUTE, Completion, SamplingSpec


class MegatronEngine:
    """A ``RolloutEngine`` on an mcore GPTModel that lives in this process."""

    def __init__(
        self,
        model: GPTModel,
        vocab_size: int,
        max_concurrent_tokens: int,
        policy_version: int = 0,
        decode: Callable[[np.ndarray], str] | None = None,
        record_routes: bool = False,
        speculation: bool | None = None,
    ) -> None:
        """
        Args:
            model: this rank's stage, unwrapped (no DDP). It is only read, and only during ``generate``.
            vocab_size: the tokenizer's; Megatron pads the model's, and padding is never sampled.
            max_concurrent_tokens: size of the KV cache in tokens; decides how many sequences run at a time.
            policy_version: optimizer steps behind the weights that the model holds now.
            decode: token ids -> text, the same on all ranks; only stop strings need it.
            record_routes: completions have the experts that each token was sent to; for a model with at most 255.
            speculation: several tokens of a sequence in one pass where that is expected to pay; the same tokens. None:
                on a CPU, whose costs that goes by.

        Raises:
            ValueError: a kind of model that the decoder doesn't know; names the settings in question. Routes of a
                model that has no experts, or more than a byte can number.
        """
        check_supported(model)
        if record_routes and not 0 < (model.config.num_moe_experts or 0) <= NO_ROUTE:
            raise ValueError(
                f"record_routes with num_moe_experts={model.config.num_moe_experts}: 1 to {NO_ROUTE} needed"
            )
        self.model = model
        self.vocab_size = vocab_size
        self.max_concurrent_tokens = max_concurrent_tokens
        self.policy_version = policy_version
        self.decode = decode
        self.record_routes = record_routes
        self.speculation = device().type == "cpu" if speculation is None else speculation
        self.shares_weights = True
        self.stats: RolloutStats | None = None
        self.refit_bytes = 0
        self._stop_strings: StopStrings | None = None  # kept from call to call, as it learns the text of each token
        self.group = parallel.groups().model
        ranks = dist.get_process_group_ranks(self.group)
        self.group_size = len(ranks)
        # Tensor ranks are neighbours: the last pipeline stage's are the last of the group, and its first one samples.
        self.sampling_rank = ranks[-parallel.tensor_parallel_size()]
        self.is_sampling_rank = dist.get_rank() == self.sampling_rank
        self.cuda_graphs = self.group_size == 1 and can_be_captured(model)
        """True: steps without a prefill run as CUDA graphs. False: kernel by kernel; set it for comparisons."""
        self._scheduler: Scheduler | None = None  # of the call that is running
        self.graphs: DecodingGraphs | None = None
        """The last ``generate`` call's graphs, with its KV cache; kept for the next call until ``sleep``."""

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; arguments and result as in ``RolloutEngine.generate``.

        Raises:
            ValueError: an empty prompt, ``seeds`` of another length than ``prompts``, a stop token outside the
                vocabulary, stop strings that are empty or that nothing here can decode, a sequence that may outgrow
                ``max_concurrent_tokens``.
            FloatingPointError: the model gave log-probs that are not finite.
            Where ranks decode in step, on all of them; an error of another kind is a RuntimeError on the others.
        """
        began = time.perf_counter()
        lockstep = Lockstep() if decodes_in_step(self.model) else None
        with torch.inference_mode(), lockstep.failing_together() if lockstep else nullcontext():
            check_request(prompts, sampling, seeds, self.vocab_size)
            batch = Batch(self, prompts, sampling, seeds, on_finish, lockstep)
            self._run(batch, lambda: batch.step() or batch.lend())
        self.stats = batch.stats(time.perf_counter() - began)
        return batch.ordered()

    def generate_in_flight(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish,
        in_flight: InFlight,
    ) -> None:
        """See ``InFlightEngine.generate_in_flight``; raises as ``generate`` does."""
        assert not decodes_in_step(self.model), "ranks that decode in step have no servers"
        with torch.inference_mode():
            check_request(prompts, sampling, seeds, self.vocab_size)
            batch = Batch(self, prompts, sampling, seeds, on_finish, None, in_flight)
            self._run(batch, lambda: batch.take_up() and batch.step())

    def _run(self, batch: Batch, step: Callable[[], bool]) -> None:
        try:
            self._scheduler = batch.scheduler
            while step():
                pass
        finally:
            self._scheduler = None
        self.graphs = batch.graphs  # only if all went well: an overflow may have left NaN in the cache

    @property
    def kv_cache_use(self) -> float:
        """Tokens of running sequences over ``max_concurrent_tokens``, now. Any thread may ask."""
        scheduler = self._scheduler
        return float(scheduler.length[: scheduler.running].sum()) / self.max_concurrent_tokens if scheduler else 0.0

    def stop_strings(self, sampling: SamplingSpec) -> StopStrings | None:
        """The finder of the spec's stop strings; None if it has none."""
        if not sampling.stop_strings:
            return None
        if self.decode is None:
            raise ValueError(f"stop_strings {list(sampling.stop_strings)}: the engine was made without ``decode``")
        if self._stop_strings is None or self._stop_strings.strings != sampling.stop_strings:
            self._stop_strings = StopStrings(sampling.stop_strings, self.decode, self.vocab_size)
        return self._stop_strings

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the version. The weights are the learner's own, hence up to date; ``named_tensors`` stays unread."""
        self.policy_version = version

    def sleep(self) -> None:
        """Free the KV cache and the graphs, which outlive a ``generate`` call where there are CUDA graphs."""
        self.graphs = None

    def wake(self) -> None:
        """Do nothing: the next ``generate`` call allocates what it needs."""

    def close(self) -> None:
        """Let go of the model."""
        self.graphs = None
        del self.model
