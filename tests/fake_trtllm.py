"""A strict stand-in for TensorRT-LLM, made of the contract: what the adapter may use, and in which order.

It refuses arguments that the contract doesn't name and calls that come at the wrong moment, and draws tokens from a
tiny model whose logits depend on the loaded weights and on nothing else. There is no Ray: workers are objects.
``tests/peers/ray_trtllm.py`` has the same workers as actors of a real one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import enum
import importlib
import importlib.machinery
import io
import os
import pickle
import re
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm.contract import Contract
from tests import cuda_ipc
from tests.fake_trtllm_executor import ABORT_S, TABLE, VOCAB, Executor, LifeCycleError, control_action_decorator
from tests.fake_trtllm_records import CudaGraphConfig, KvCacheConfig, SamplingParams, SleepConfig, strict


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


class RequestOutput:
    """A request under way: who stops waiting for it has not ended it."""

    def __init__(self, engine: AsyncLLM, prompt: list[int], sampling: SamplingParams) -> None:
        self.loop = asyncio.get_running_loop()
        self.task = self.loop.create_task(engine._generate(prompt, sampling))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.outputs: list[CompletionOutput] = []

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> RequestOutput:
        self.outputs = [await asyncio.shield(self.task)]
        return self

    def abort(self) -> None:
        FAULTS.seen.append(("abort", ()))
        self.loop.call_soon_threadsafe(self.task.cancel)


@dataclass
class Faults:
    """What goes wrong, and what was seen; one for all engines of a test."""

    device_ids: list[str] = field(default_factory=lambda: ["GPU-0"])
    contract: Contract = contract.V1_2
    """The generation that the library is of."""
    ignore_seeds: bool = False
    """As TorchSampler of 1.2."""
    raw_logprobs: bool = False
    """As TorchSampler: log-probs before temperature."""
    finish_reason: str | None = None
    cut_at: int | None = None
    fail_request: int | None = None
    """The how-manyth request of all fails."""
    hang: bool = False
    hang_after: int | None = None
    """The requests after the how-manyth of all hang."""
    drop_stop_token: bool = False
    drop_logprobs: bool = False
    seen: list[Any] = field(default_factory=list)
    """(call, argument) in their order."""
    bucket_bytes: list[int] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    requests: int = 0
    engines: list[Any] = field(default_factory=list)


FAULTS = Faults()


def contract_class(name: str) -> contract.LibraryClass:
    found = FAULTS.contract.find(name)
    assert found, f"{name} is not of {FAULTS.contract.version}"
    return found


def memory_tags() -> tuple[str, ...]:
    return contract_class(contract.MEMORY_TAGS.name).values


class WorkerExtension:
    """``rlhf_utils.WorkerExtension``."""

    @control_action_decorator
    def update_weights(self, ipc_handles: dict[str, str] | None = None) -> None:
        engine = self.engine
        engine.require(not engine.live, "update_weights while requests are under way")
        engine.require(engine.has_weights, "update_weights while the weights are released")
        if ipc_handles is None:
            engine.require(engine.unfinished_update, "finalize without an update")
            engine.unfinished_update = False
            engine.reset_prefix_cache()
            return
        engine.unfinished_update = True
        handles = Restricted(io.BytesIO(base64.b64decode(ipc_handles[self.device_id]))).load()
        tensors = {}
        for name, (function, arguments) in handles:
            on_this_device = [*arguments[:6], self.device_index, *arguments[7:]]
            tensors[name] = cuda_ipc.open_tensor(function, on_this_device)
        self.take(tensors)
        FAULTS.bucket_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))


class Restricted(pickle.Unpickler):
    """What the library takes in a payload: 1.2 lets torch's names pass, 1.3 all but these of them (rlhf_utils.py)."""

    denied = frozenset({("torch.storage", "_load_from_bytes"), ("torch.hub", "_load_local"), ("torch", "save")})

    def find_class(self, module: str, name: str) -> Any:
        if not re.match("^torch.*", module) or (module, name) in self.denied:
            raise ValueError(f"Import {module} | {name} is not allowed")
        return super().find_class(module, name)


class Worker:
    def __init__(self, device_id: str) -> None:
        self.device_id, self.engine = device_id, Executor(memory_tags())
        self.device_index = 0  # in the worker's own process

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load whole tensors of another process's memory, which is gone afterwards."""
        self.engine.weights.update({name: tensor.clone() for name, tensor in tensors.items()})

    def report_device_id(self) -> str:
        return self.device_id

    @control_action_decorator
    def sleep(self, tags: list[str]) -> None:
        engine = self.engine
        engine.require(not engine.live, "release while requests are under way")
        engine.require(set(tags) <= engine.present, f"release of what is released: {set(tags) - engine.present}")
        engine.require(not engine.unfinished_update, "release before finalize")
        engine.present -= set(tags)
        if contract.KV_CACHE_TAG in tags:
            engine.stale |= engine.prefixes  # the index outlives the memory

    @control_action_decorator
    def wakeup(self, tags: list[str]) -> None:
        engine = self.engine
        engine.require(not set(tags) & engine.present, f"resume of what is there: {set(tags) & engine.present}")
        if contract.KV_CACHE_TAG in tags:
            engine.require(len(tags) == 1 and engine.has_weights, "the KV cache comes last")
            engine.require(not engine.unfinished_update, "resume of the KV cache before finalize")
        engine.present |= set(tags)


def draw(
    weights: torch.Tensor, sampler: str | None, shared: np.random.Generator, prompt: list[int], sampling: SamplingParams
) -> CompletionOutput:
    """A completion. Args: weights: float [VOCAB, VOCAB]; shared: TorchSampler's stream, the same for all requests."""
    greedy = sampling.top_k == 1 or (sampling.temperature, sampling.top_k, sampling.top_p) == (None, None, None)
    cpp = sampler == "TRTLLMSampler"
    honours_seeds = (cpp or FAULTS.contract is contract.V1_4) and not FAULTS.ignore_seeds
    generator = np.random.default_rng(sampling.seed) if honours_seeds else shared
    raws = torch.log_softmax(weights.double(), -1).numpy()
    tempered = torch.log_softmax(weights.double() / (sampling.temperature or 1.0), -1).numpy()
    drawn_from = np.exp(tempered)
    told = tempered if cpp and not FAULTS.raw_logprobs else raws
    tokens: list[int] = []
    entries = []
    last, reason = prompt[-1], "length"
    while len(tokens) < sampling.max_tokens and reason == "length":
        raw, probs, row = raws[last % VOCAB], drawn_from[last % VOCAB], told[last % VOCAB]
        last = int(raw.argmax()) if greedy else int(generator.choice(VOCAB, p=probs))
        tokens.append(last)
        # the likeliest first, whichever was drawn
        entries.append({token: Logprob(float(row[token])) for token in (int(raw.argmax()), last)})
        if len(tokens) < sampling.max_tokens and last in (sampling.stop_token_ids or ()):
            reason = "stop"  # at the length limit it is called "length"
        if len(tokens) == FAULTS.cut_at:
            break
    if reason == "stop" and (FAULTS.drop_stop_token or not sampling.include_stop_str_in_output):
        tokens.pop()
    logprobs = None if FAULTS.drop_logprobs or not sampling.logprobs else entries
    return CompletionOutput(tokens, logprobs, FAULTS.finish_reason or reason)


class AsyncLLM:
    def __init__(self, **given: Any) -> None:
        self.args = types.SimpleNamespace(**strict(contract_class(contract.LLM_ARGS.name), given))
        FAULTS.environments.append(dict(os.environ))
        module, _, name = self.args.ray_worker_extension_cls.rpartition(".")
        extension = getattr(importlib.import_module(module), name)
        clashes = [n for n in dir(extension) if not n.startswith("__") and hasattr(Worker, n)]
        assert not clashes, f"the worker class already defines {clashes}"
        self.worker_class = type("ExtendedWorker", (Worker, extension), {})
        self.ready = self.closed = self.paused = False
        self.under_way: list[RequestOutput] = []
        self.generator = np.random.default_rng(42)  # TorchSampler's, the same in every engine
        FAULTS.engines.append(self)

    async def setup_async(self) -> None:
        ids = FAULTS.device_ids
        if len(ids) != self.args.tensor_parallel_size:
            raise LifeCycleError(f"{self.args.tensor_parallel_size} workers on {len(ids)} GPUs")
        self.workers = [self.worker_class(device_id) for device_id in ids]
        self.ready = True

    async def collective_rpc(self, method: str, args: tuple = ()) -> list[Any]:
        FAULTS.seen.append((method, args))
        sleeps = getattr(self.args, "enable_sleep", False) or getattr(self.args, "sleep_config", None)
        if method in ("sleep", "wakeup") and not sleeps:
            raise ValueError("enable_sleep=False")
        return [getattr(worker, method)(*args) for worker in self.workers]

    async def release(self, tags: list[str]) -> None:
        await self.collective_rpc("sleep", args=(tags,))

    async def resume(self, tags: list[str]) -> None:
        await self.collective_rpc("wakeup", args=(tags,))

    async def update_weights(self, weights: dict[str, str] | None) -> None:
        await self.collective_rpc("update_weights", args=(weights,))

    async def pause_generation(self) -> None:
        FAULTS.seen.append(("pause_generation", ()))
        self.paused = True
        for request in self.under_way:
            request.task.cancel()

    async def resume_generation(self) -> None:
        self.paused = False

    def generate_async(self, inputs: list[int], sampling_params: SamplingParams, streaming: bool = False) -> Any:
        if self.paused:
            raise LifeCycleError("generate while generation is paused")
        self.under_way.append(RequestOutput(self, list(inputs), sampling_params))
        return self.under_way[-1]

    async def _generate(self, prompt: list[int], sampling: SamplingParams) -> CompletionOutput:
        if not self.ready or self.closed:
            raise LifeCycleError("generate before start or after shutdown")
        if len(prompt) > self.args.max_input_len or len(prompt) + sampling.max_tokens > self.args.max_seq_len:
            raise ValueError(f"prompt of {len(prompt)} + {sampling.max_tokens} tokens is too long")
        if sampling.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        FAULTS.requests += 1
        number = FAULTS.requests
        return await self._draw(number, prompt, sampling, getattr(self.args, "sampler_type", None))

    async def _draw(
        self, number: int, prompt: list[int], sampling: SamplingParams, sampler: str | None
    ) -> CompletionOutput:
        with contextlib.ExitStack() as running:
            for worker in self.workers:
                running.enter_context(worker.engine.running(prompt, asyncio.current_task()))
            late = FAULTS.hang_after is not None and number > FAULTS.hang_after
            try:
                await asyncio.sleep(3600 if FAULTS.hang or late else 0)
            except asyncio.CancelledError:
                await asyncio.sleep(ABORT_S)
                raise
            if FAULTS.fail_request == number:
                raise RuntimeError("CUDA error: an illegal memory access")
            return draw(self.workers[0].engine.weights[TABLE], sampler, self.generator, prompt, sampling)

    def shutdown(self) -> None:
        self.closed = True
        if any(request.task.cancelling() and not request.task.done() for request in self.under_way):
            time.sleep(2 * ABORT_S)


CLASSES = (
    (contract.ASYNC_LLM, AsyncLLM),
    (contract.KV_CACHE_CONFIG, KvCacheConfig),
    (contract.CUDA_GRAPH_CONFIG, CudaGraphConfig),
    (contract.SLEEP_CONFIG, SleepConfig),
    (contract.SAMPLING_PARAMS, SamplingParams),
    (contract.WORKER_EXTENSION, WorkerExtension),
)


def install(monkeypatch: Any, generation: Contract = contract.V1_2) -> Faults:
    """Put it in the place of ``tensorrt_llm`` for one test; returns that test's faults, none of them set."""
    global FAULTS
    FAULTS = Faults(contract=generation)
    args = contract_class(contract.LLM_ARGS.name)
    members = {tag.upper(): tag for tag in (*memory_tags(), "_no_capture_init_kv_cache")}
    made = (
        (contract.LLM_ARGS, type(args.name, (), {"model_fields": dict(args.fields)})),
        (contract.MEMORY_TAGS, enum.Enum(contract.MEMORY_TAGS.name, members)),
    )
    for cls, stand_in in (*CLASSES, *made):
        if place := generation.find(cls.name):
            setattr(_module(monkeypatch, place.module), cls.name, stand_in)
    return FAULTS


def _module(monkeypatch: Any, dotted: str) -> Any:
    """A module of that name, and its parents, in ``sys.modules`` for one test."""
    parts = dotted.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        if name not in sys.modules:
            module: Any = types.ModuleType(name)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[name])
    return sys.modules[dotted]
