"""What is called of TensorRT-LLM, and the one place that imports it.

Its classes stand here as protocols, as the library is not there at type checking. ``contract.py`` says the same as
data, which ``check.py`` compares with a real package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm.contract import KV_CACHE_TAG, VERSION, Contract, LibraryClass, contract_of
from nemo_aapo.errors import RunError


class Logprob(Protocol):
    """One log-prob of a token."""

    logprob: float


class CompletionOutput(Protocol):
    """One completion."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Logprob]] | None
    """For each token of the completion the log-probs of some tokens, by token id."""
    finish_reason: str | None


class RequestOutput(Protocol):
    """The answer to one request; awaiting it waits for its end."""

    outputs: Sequence[CompletionOutput]

    def abort(self) -> None: ...
    def __await__(self) -> Generator[Any, None, RequestOutput]: ...


class AsyncLLM(Protocol):
    """An engine."""

    async def setup_async(self) -> object: ...
    def generate_async(self, inputs: list[int], sampling_params: object) -> RequestOutput: ...
    async def pause_generation(self) -> object: ...
    async def resume_generation(self) -> object: ...
    async def release(self, tags: list[str]) -> object: ...
    async def resume(self, tags: list[str]) -> object: ...
    async def update_weights(self, weights: dict[str, str] | None) -> object: ...
    async def collective_rpc(self, method: str) -> list[Any]: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Library:
    """The classes that are called, all with keyword arguments, and what was found out about them."""

    contract: Contract
    """The generation that the installed library belongs to, by the arguments that it has."""
    engine: Callable[..., AsyncLLM]
    sampling_params: Callable[..., object]
    kv_cache_config: Callable[..., object]
    cuda_graph_config: Callable[..., object]
    sleep_config: Callable[..., object] | None
    """Since 1.3."""
    weight_tags: tuple[str, ...]
    """Tags of all memory that can be released, but for the KV cache."""


def load() -> Library:
    """Import the library.

    Raises:
        RunError: it can't be imported, or it has other names.
    """
    try:
        agreed = contract_of(_imported(contract.LLM_ARGS).model_fields)
        engine, sampling_params, kv_cache_config, cuda_graph_config, sleep_config, memory_type = (
            _imported(agreed.find(cls.name)) for cls in _CALLED
        )
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library of CUDA's is missing
        raise RunError(
            f"TensorRT-LLM can't be imported: {error}. `python -m nemo_aapo.engines.trtllm.check` tells whether it is "
            f"another version than {VERSION}"
        ) from error
    # Asked of the library: weights moved to tags of their own in 1.3, and what a list of ours lacked would stay in the
    # learner's memory. Private ones begin with an underscore (as in NeMo-RL's trtllm_worker_async.py).
    tags = [str(member.value) for member in memory_type]
    weight_tags = tuple(tag for tag in tags if tag != KV_CACHE_TAG and not tag.startswith("_"))
    return Library(agreed, engine, sampling_params, kv_cache_config, cuda_graph_config, sleep_config, weight_tags)


_CALLED = (
    contract.ASYNC_LLM,
    contract.SAMPLING_PARAMS,
    contract.KV_CACHE_CONFIG,
    contract.CUDA_GRAPH_CONFIG,
    contract.SLEEP_CONFIG,
    contract.MEMORY_TAGS,
)


def _imported(cls: LibraryClass | None) -> Any:
    """The class itself, from the module where its generation has it; None if it has none."""
    return cls and getattr(importlib.import_module(cls.module), cls.name)


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
            """Empty the prefix cache. Trap: releasing the KV cache leaves the index of what was in it.

            Trap: what was aborted holds its blocks until the executor's next iterations, and would put them back
            afterwards; newer releases refuse to empty it then. A control action begins when all requests have ended.
            """
            with self.engine.control_action():
                self.engine.reset_prefix_cache()

    return WorkerExtension
