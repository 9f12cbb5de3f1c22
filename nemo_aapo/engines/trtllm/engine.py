"""Rollouts by TensorRT-LLM's AsyncLLM, in the learner's own GPUs or inside a rollout server.

Colocated, the engine sleeps while the learner trains. One step, as the trainer calls it:

    wake        resume the weights (if asleep since), then the KV cache, last
    generate    one request for each completion
    sleep       empty the prefix cache, release KV cache and weights
    update      resume the weights, hand over buckets, finalize (which empties the prefix cache); KV cache still out

Never run on hardware here: docs/guide/tensorrt_llm.md says what holds this code instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.engines.base import OnFinish, RolloutStats
from nemo_aapo.engines.elsewhere import Finished, arranged, stats_of
from nemo_aapo.engines.ipc import memory
from nemo_aapo.engines.ipc.receiver import SharedBucket
from nemo_aapo.engines.trtllm import library, placement, refit
from nemo_aapo.engines.trtllm.client import EngineClient
from nemo_aapo.engines.trtllm.contract import KV_CACHE_TAG
from nemo_aapo.engines.trtllm.library import CompletionOutput
from nemo_aapo.engines.trtllm.placement import OwnerActions, OwnerFailed
from nemo_aapo.engines.trtllm.requests import check_request, read_completion, sampling_arguments
from nemo_aapo.engines.trtllm.selftest import are_tempered, check_seeds
from nemo_aapo.engines.trtllm.settings import TrtllmSettings, cache_fraction, check, llm_arguments
from nemo_aapo.errors import ConfigError, LostRankError, RequestError, RunError
from nemo_aapo.text.transformers5 import readable_directory
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.buckets import tensor_buckets

T = TypeVar("T")
WORKER_EXTENSION = f"{library.__name__}.WorkerExtension"
"""The class that the engine's workers get, by the name that they find it under."""


class TrtllmEngine:
    """A ``RolloutEngine``. In the learner's GPUs all ranks of a model-parallel group call it alike; one owns it."""

    shares_weights = False

    def __init__(
        self,
        settings: TrtllmSettings,
        ranks: placement.Ranks,
        gpus: Sequence[placement.Gpu],
        *,
        colocated: bool,
        policy_version: int = 0,
    ) -> None:
        """Start the engine. A colocated one is asleep afterwards.

        Args:
            ranks: who calls it.
            gpus: those that this process hands weights to: its own, or all of the engine's if it is alone.
            colocated: the learner trains on the same GPUs while the engine sleeps.
            policy_version: of the weights in ``settings.model_path``.

        Raises:
            RunError: on every rank: the GPUs don't fit, the engine does not start, it ignores seeds, or it can't tell
                the log-probs at a temperature of the run's.
        """
        self.settings, self.policy_version = settings, policy_version
        self.stats: RolloutStats | None = None
        self.refit_bytes = 0
        self._ranks, self._gpus, self._colocated = ranks, gpus, colocated
        self._started: EngineClient | None = None
        self._model = contextlib.ExitStack()
        self._calls = threading.Lock()
        self._broken = ""
        self._weights_in = self._cache_in = True
        self._weight_tags: tuple[str, ...] = ()  # the owner's, asked of the library
        self._actions = OwnerActions(ranks)
        everywhere = [gpu for part in ranks.gather([(gpu, settings.reserved_bytes) for gpu in gpus]) for gpu in part]
        try:
            self._tempered = self._on_owner(lambda: self._start(everywhere))
            self.sleep()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(
        cls, config: Config, *, in_learner: bool = False, policy_version: int = 0, reserved_bytes: int = 0
    ) -> TrtllmEngine:
        """Start the engine that a configuration describes.

        Args:
            in_learner: the learner's ranks own it together, on their GPUs; else this process does, a server's.
            policy_version: of the weights in ``model.path``.
            reserved_bytes: see ``TrtllmSettings``.

        Raises:
            ConfigError: this machine can't run it.
            RunError: it does not start.
        """
        check(config)
        settings = TrtllmSettings.from_config(config, reserved_bytes)
        if in_learner:
            memory.give_back()
            gpus = [placement.visible_gpu()]
            return cls(settings, placement.ModelParallelRanks(), gpus, colocated=True, policy_version=policy_version)
        visible = torch.cuda.device_count()
        if visible < settings.tensor_parallel_size:
            raise ConfigError(
                f"rollout.trtllm.tensor_parallel_size={settings.tensor_parallel_size}: this process sees {visible} GPUs"
            )
        gpus = [placement.visible_gpu(device) for device in range(settings.tensor_parallel_size)]
        takes_turns = config.rollout.refit == "ipc"
        return cls(settings, placement.Alone(), gpus, colocated=takes_turns, policy_version=policy_version)

    # ------------------------------------------------------------------ start and end

    @property
    def _client(self) -> EngineClient:
        """The engine's client, which the owner alone has."""
        if self._started is None:
            raise RuntimeError("the TensorRT-LLM engine is not started, or it is closed")
        return self._started

    def _start(self, places: Sequence[tuple[placement.Gpu, int]]) -> bool:
        """Start the library's engine; called on the owner alone. Whether its log-probs are after temperature.

        Args:
            places: its GPUs, and the bytes that the learner's rank there will still take.
        """
        gpus = [gpu for gpu, _ in places]
        placement.check_gpus(gpus, self.settings.tensor_parallel_size)
        with placement.engine_environment(gpus):
            found = library.load()
            directory = self._model.enter_context(readable_directory(Path(self.settings.model_path)))
            free = [(gpu.free_bytes, reserved) for gpu, reserved in places]
            settings = dataclasses.replace(
                self.settings,
                model_path=str(directory),
                kv_cache_fraction=cache_fraction(self.settings.kv_cache_fraction, free, directory),
            )
            arguments = llm_arguments(settings, found, colocated=self._colocated, worker_extension=WORKER_EXTENSION)
            self._weight_tags = found.weight_tags
            self._started = EngineClient(found, arguments, self.settings.timeout_s, self._actions.beat)
        workers = sorted(self._client.ask_workers("report_device_id"))
        expected = sorted(gpu.uuid for gpu in gpus)
        if workers != expected:
            raise RunError(f"TensorRT-LLM's workers run on the GPUs {workers}, but the weights lie on {expected}")
        check_seeds(self._draw, self.settings.max_new_tokens)
        return are_tempered(self._draw, self.settings.temperatures)

    def _draw(self, token: int, sampling: SamplingSpec, seed: int) -> CompletionOutput:
        [(_, output)] = self._client.complete([(seed, [token], sampling_arguments(sampling, seed))])
        return output

    def close(self) -> None:
        """End the engine."""
        if self._started is not None:
            self._started.close()
            self._started = None
        self._model.close()
        self._broken = self._broken or "it is closed"

    # ------------------------------------------------------------------ memory

    def sleep(self) -> None:
        """Give KV cache and weights back to the learner. An engine that has its GPUs for itself keeps them."""
        if not self._colocated or not (self._weights_in or self._cache_in):
            return
        with self._exclusive("sleep"):

            def release() -> None:
                self._client.ask_workers("forget_prefixes")
                self._client.release([*self._weight_tags * self._weights_in, *[KV_CACHE_TAG] * self._cache_in])

            self._on_owner(release)
            self._weights_in = self._cache_in = False

    def wake(self) -> None:
        """Take weights and KV cache again."""
        if self._cache_in:
            return
        with self._exclusive("wake"):
            self._resume_weights()
            self._make_room()  # a refit's last bucket is the learner's until here
            self._on_owner(lambda: self._client.resume([KV_CACHE_TAG]))
            self._cache_in = True

    def _resume_weights(self) -> None:
        if self._weights_in:
            return
        self._make_room()
        self._on_owner(lambda: self._client.resume(self._weight_tags))
        self._weights_in = True

    def _make_room(self) -> None:
        """Give back what the learner's allocator holds and doesn't use, on all of the engine's GPUs, before it takes
        them."""
        memory.give_back()
        self._ranks.gather(None)

    # ------------------------------------------------------------------ weights

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over weights; see ``RolloutEngine.update_weights``. Every rank of the engine iterates.

        Raises:
            RunError: on every rank. The engine may hold mixed weights then, and refuses to go on.
        """
        self._take(self._shared(named_tensors), version)

    @property
    def device_names(self) -> list[str]:
        """UUIDs of the GPUs that this process hands weights to."""
        return [gpu.uuid for gpu in self._gpus]

    def take_handles(self, buckets: Iterable[SharedBucket], names: Set[str], version: int) -> int:
        """Take over weights that lie in another process's memory on these GPUs; the bytes that it holds of them.

        Args:
            names: of all tensors that must come.

        Raises:
            WeightsError: one did not come, or lies elsewhere.
            RunError: see ``update_weights``.
        """
        self._take(self._opened(buckets, names), version)
        return self.refit_bytes

    def _opened(self, buckets: Iterable[SharedBucket], names: Set[str]) -> Iterator[dict[str, str]]:
        for found, size in refit.payloads_of(buckets, names, self._gpus):
            self.refit_bytes += size
            yield found

    def _shared(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, str]]:
        """Payloads of buckets in this rank's memory; each stays there until the next one is asked for."""
        for bucket in tensor_buckets(named_tensors, self.settings.refit_bucket_bytes):
            self.refit_bytes += sum(tensor.nbytes for _, tensor in bucket)
            found, shared = refit.payloads(bucket, self._gpus)
            bucket.clear()  # the buffers have all of it, and the export is not to hold it twice
            yield found
            del shared

    def _take(self, payloads: Iterable[dict[str, str]], version: int) -> None:
        with self._exclusive("update_weights"):  # drained: no request is under way
            self._resume_weights()
            self.refit_bytes = 0
            for payload in payloads:
                self._broken = "a refit failed half-way, its weights are mixed"
                parts = self._ranks.gather(payload)
                self._on_owner(functools.partial(self._hand_over, parts))
            self._on_owner(lambda: self._client.update_weights(None))
            memory.give_back()
            self.policy_version, self._broken = version, ""

    def _hand_over(self, parts: Sequence[dict[str, str]]) -> None:
        self._client.update_weights({uuid: handles for part in parts for uuid, handles in part.items()})

    # ------------------------------------------------------------------ completions

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``. Tokens are reproduced as far as the library's kernels are: a near tie may
        fall otherwise in another batch.

        Raises:
            ValueError: see ``check_request``. RequestError: a sequence is longer than the engine was made for.
            RunError: on every rank: a request failed, timed out or was cut short.
        """
        check_request(prompts, sampling, seeds, tempered=self._tempered)
        settings = self.settings
        longest = max(map(len, prompts), default=0)
        if longest > settings.max_prompt_tokens or sampling.max_new_tokens > settings.max_new_tokens:
            raise RequestError(
                f"{longest} + {sampling.max_new_tokens} tokens, but the engine was made for prompts of "
                f"{settings.max_prompt_tokens} and completions of {settings.max_new_tokens}"
            )
        with self._exclusive("generate"):
            if not self._cache_in:
                raise RuntimeError("generate() while the engine sleeps: wake() comes first")
            began = time.perf_counter()
            finished: Finished = []

            def hear(i: int, j: int, completion: Completion) -> object:
                finished.append((i, j, completion))
                return on_finish(i, j, completion) if on_finish else False

            self._on_owner(lambda: self._complete(prompts, sampling, seeds, hear), hear)
        self.stats = stats_of(finished, time.perf_counter() - began)
        return arranged(finished, seeds)

    def _complete(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        hear: OnFinish,
    ) -> None:
        """Generate them, and let each be heard as it ends; called on the owner alone."""
        requests = [
            ((i, j), prompt.tolist(), sampling_arguments(sampling, seed))
            for i, (prompt, row) in enumerate(zip(prompts, seeds, strict=True))
            for j, seed in enumerate(row)
        ]
        with contextlib.closing(self._client.complete(requests)) as answers:
            for (i, j), output in answers:
                completion = read_completion(output, sampling, self.policy_version)
                self._actions.tell((i, j, completion))
                if hear(i, j, completion):
                    break

    # ------------------------------------------------------------------ together

    def _on_owner(self, action: Callable[[], T], hear: OnFinish | None = None) -> T:
        """As ``OwnerActions.run``; what ``action`` raised ends the engine on every rank."""
        try:
            return self._actions.run(action, hear)
        except OwnerFailed as failed:
            self._broken = str(failed)
            raise failed.__cause__ or RunError(str(failed)) from None

    @contextlib.contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        """One call at a time. After a failure requests may be under way, or weights be mixed: a server ends by this."""
        if self._broken:
            with contextlib.suppress(RunError):  # it may not even answer to that
                self.close()
            raise LostRankError(f"{what}: the TensorRT-LLM engine can't go on: {self._broken}")
        if not self._calls.acquire(blocking=False):
            raise RuntimeError(f"{what}() while another call of the engine is under way")
        try:
            yield
        finally:
            self._calls.release()
