"""Rollouts by TensorRT-LLM's AsyncLLM, in the learner's own GPUs or inside a rollout server.

Colocated, the engine sleeps while the learner trains. One step, as the trainer calls it:

    wake        resume the weights (if asleep since), then the KV cache, last
    generate    one request for each completion
    sleep       empty the prefix cache, release KV cache and weights
    update      resume the weights, hand over buckets, finalize (which empties the prefix cache); KV cache still out

Never run on hardware here: docs/guide/tensorrt_llm.md says what holds this code instead. It is the only module that
imports tensorrt_llm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import torch

from nemo_aapo.config import Config
from nemo_aapo.engines.base import OnFinish, RolloutStats
from nemo_aapo.engines.elsewhere import Finished, arranged, stats_of
from nemo_aapo.engines.trtllm import placement, refit
from nemo_aapo.engines.trtllm.client import EngineClient
from nemo_aapo.engines.trtllm.contract import KV_CACHE_TAG, VERSION, WEIGHT_TAGS
from nemo_aapo.engines.trtllm.library import Library
from nemo_aapo.engines.trtllm.requests import check_request, read_completion, sampling_arguments
from nemo_aapo.engines.trtllm.settings import TrtllmSettings, check, llm_arguments
from nemo_aapo.errors import ConfigError, RunError
from nemo_aapo.text.transformers5 import readable_directory
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils.buckets import tensor_buckets

T = TypeVar("T")


def _library() -> Library:
    """The library's classes that the engine calls."""
    try:
        from tensorrt_llm._torch.async_llm import AsyncLLM
        from tensorrt_llm.llmapi.llm_args import KvCacheConfig
        from tensorrt_llm.sampling_params import SamplingParams
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's is missing
        raise RunError(
            f"TensorRT-LLM can't be imported: {error}. `python -m nemo_aapo.engines.trtllm.check` tells whether it is "
            f"another version than {VERSION}"
        ) from error
    return SimpleNamespace(AsyncLLM=AsyncLLM, KvCacheConfig=KvCacheConfig, SamplingParams=SamplingParams)


def __getattr__(name: str) -> Any:
    """``WorkerExtension``, made where it is asked for: in the engine's workers, which find it by this module's name."""
    if name == "WorkerExtension":
        return _worker_extension()
    raise AttributeError(name)


def _worker_extension() -> type:
    from tensorrt_llm.llmapi import rlhf_utils

    class WorkerExtension(rlhf_utils.WorkerExtension):
        """The library's methods for reinforcement learning, and one more."""

        def forget_prefixes(self) -> None:
            """Empty the prefix cache. Trap: releasing the KV cache leaves the index of what was in it."""
            self.engine.reset_prefix_cache()

    return WorkerExtension


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
            RunError: on every rank: the GPUs don't fit, the engine does not start, or it ignores seeds.
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
        every_gpu = [gpu for part in ranks.gather(list(gpus)) for gpu in part]
        try:
            self._on_owner(lambda: self._start(every_gpu))
            self.sleep()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, config: Config, *, colocated: bool = False, policy_version: int = 0) -> TrtllmEngine:
        """Start the engine that a configuration describes.

        Args:
            colocated: in the learner's GPUs; else this process has its GPUs for itself.
            policy_version: of the weights in ``model.path``.

        Raises:
            ConfigError: this machine can't run it.
            RunError: it does not start.
        """
        check(config)
        settings = TrtllmSettings.from_config(config)
        if colocated:
            gpus = [placement.visible_gpu()]
            return cls(settings, placement.ModelParallelRanks(), gpus, colocated=True, policy_version=policy_version)
        visible = torch.cuda.device_count()
        if visible < settings.tensor_parallel_size:
            raise ConfigError(
                f"rollout.trtllm.tensor_parallel_size={settings.tensor_parallel_size}: this process sees {visible} GPUs"
            )
        gpus = [placement.visible_gpu(device) for device in range(settings.tensor_parallel_size)]
        return cls(settings, placement.Alone(), gpus, colocated=False, policy_version=policy_version)

    # ------------------------------------------------------------------ start and end

    @property
    def _client(self) -> EngineClient:
        """The engine's client, which the owner alone has."""
        if self._started is None:
            raise RuntimeError("the TensorRT-LLM engine is not started, or it is closed")
        return self._started

    def _start(self, gpus: Sequence[placement.Gpu]) -> None:
        """Start the library's engine; called on the owner alone."""
        placement.check_gpus(gpus, self.settings.tensor_parallel_size)
        with placement.engine_environment(gpus):
            library = _library()
            directory = self._model.enter_context(readable_directory(Path(self.settings.model_path)))
            arguments = llm_arguments(
                dataclasses.replace(self.settings, model_path=str(directory)),
                colocated=self._colocated,
                worker_extension=f"{__name__}.WorkerExtension",
                kv_cache_config=library.KvCacheConfig,
            )
            self._started = EngineClient(library, arguments, self.settings.timeout_s)
        workers = sorted(self._client.ask_workers("report_device_id"))
        expected = sorted(gpu.uuid for gpu in gpus)
        if workers != expected:
            raise RunError(f"TensorRT-LLM's workers run on the GPUs {workers}, but the weights lie on {expected}")
        self._check_seeds()

    def _check_seeds(self) -> None:
        """See that a seed gives the same tokens again and another one others, or all engines would sample alike.

        Raises:
            RunError: it is not so.
        """
        sampling = SamplingSpec(
            temperature=1.0, max_new_tokens=min(16, self.settings.max_new_tokens), stop_token_ids=()
        )

        def tokens(seed: int) -> list[int]:
            [(_, output)] = self._client.complete([(seed, [0], sampling_arguments(sampling, seed))])
            return list(output.token_ids)

        first, again, others = tokens(1), tokens(1), [tokens(seed) for seed in (2, 3, 4)]
        if first != again or all(other == first for other in others):
            raise RunError(
                "TensorRT-LLM's sampler ignores the seeds of requests: engines would draw the same completions of "
                f"one prompt. Use version {VERSION}, or rollout.engine=megatron"
            )

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
        tags = (*WEIGHT_TAGS * self._weights_in, *(KV_CACHE_TAG,) * self._cache_in)
        if not self._colocated or not tags:
            return
        with self._exclusive("sleep"):

            def release() -> None:
                self._client.ask_workers("forget_prefixes")
                self._client.release(tags)

            self._on_owner(release)
            self._weights_in = self._cache_in = False

    def wake(self) -> None:
        """Take weights and KV cache again."""
        if self._cache_in:
            return
        with self._exclusive("wake"):
            self._resume_weights()
            self._on_owner(lambda: self._client.resume([KV_CACHE_TAG]))
            self._cache_in = True

    def _resume_weights(self) -> None:
        if self._weights_in:
            return
        torch.cuda.empty_cache()  # what the learner's allocator holds and doesn't use
        self._ranks.gather(None)  # on all of the engine's GPUs, before it takes them
        self._on_owner(lambda: self._client.resume(WEIGHT_TAGS))
        self._weights_in = True

    # ------------------------------------------------------------------ weights

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over weights; see ``RolloutEngine.update_weights``. Every rank of the engine iterates.

        Raises:
            RunError: on every rank. The engine may hold mixed weights then, and refuses to go on.
        """
        with self._exclusive("update_weights"):  # drained: no request is under way
            self._broken = "a refit failed half-way, its weights are mixed"
            self._resume_weights()
            self.refit_bytes = 0
            for bucket in tensor_buckets(named_tensors, self.settings.refit_bucket_bytes):
                found, alive = refit.payloads(bucket, self._gpus)
                parts = self._ranks.gather(found)
                self.refit_bytes += sum(tensor.nbytes for _, tensor in bucket)
                self._on_owner(functools.partial(self._hand_over, parts))
                del alive, bucket  # until here the engine may read it
            self._on_owner(lambda: self._client.update_weights(None))
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
            ValueError: see ``check_request``; a sequence that is longer than the engine was made for.
            RunError: on every rank: a request failed, timed out or was cut short.
        """
        check_request(prompts, sampling, seeds)
        settings = self.settings
        longest = max(map(len, prompts), default=0)
        if longest > settings.max_prompt_tokens or sampling.max_new_tokens > settings.max_new_tokens:
            raise ValueError(
                f"{longest} + {sampling.max_new_tokens} tokens, but the engine was made for prompts of "
                f"{settings.max_prompt_tokens} and completions of {settings.max_new_tokens}"
            )
        with self._exclusive("generate"):
            if not self._cache_in:
                raise RuntimeError("generate() while the engine sleeps: wake() comes first")
            began = time.perf_counter()
            finished = self._on_owner(lambda: self._complete(prompts, sampling, seeds, on_finish))
        if on_finish and not self._ranks.owner:
            for ended in finished:
                on_finish(*ended)
        self.stats = stats_of(finished, time.perf_counter() - began)
        return arranged(finished, seeds)

    def _complete(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingSpec,
        seeds: Sequence[Sequence[int]],
        on_finish: OnFinish | None,
    ) -> Finished:
        """All completions in the order in which they end; called on the owner alone."""
        requests = [
            ((i, j), prompt.tolist(), sampling_arguments(sampling, seed))
            for i, (prompt, row) in enumerate(zip(prompts, seeds, strict=True))
            for j, seed in enumerate(row)
        ]
        finished: Finished = []
        with contextlib.closing(self._client.complete(requests)) as answers:
            for (i, j), output in answers:
                completion = read_completion(output, sampling, self.policy_version)
                finished.append((i, j, completion))
                if on_finish and on_finish(i, j, completion):
                    break
        return finished

    # ------------------------------------------------------------------ together

    def _on_owner(self, action: Callable[[], T]) -> T:
        """What ``action`` returned on the owner, on every rank; what it raised there ends the engine on every rank."""
        result: T | None = None
        failure: Exception | None = None
        if self._ranks.owner:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, message = self._ranks.broadcast((result, "" if failure is None else str(failure) or repr(failure)))
        if message:
            self._broken = message
            raise failure if failure is not None else RunError(message)
        return cast(T, result)  # what the owner's action returned, as it did not fail

    @contextlib.contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        """One call at a time, and none after a failure: requests may be under way, or weights be mixed."""
        if self._broken:
            raise RunError(f"{what}: the TensorRT-LLM engine can't go on: {self._broken}")
        if not self._calls.acquire(blocking=False):
            raise RuntimeError(f"{what}() while another call of the engine is under way")
        try:
            yield
        finally:
            self._calls.release()
