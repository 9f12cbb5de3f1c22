"""Engines by their names in the configuration: the trainer's (``rollout.engine``) and a server's own."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_aapo.config import Config, ModelShape, pad_multiple
from nemo_aapo.engines.base import RolloutEngine
from nemo_aapo.utils.libraries import importing

if TYPE_CHECKING:  # servers with another engine do without Megatron
    from nemo_aapo.engines.collective.plan import Rendezvous
    from nemo_aapo.engines.collective.refit import Sender
    from nemo_aapo.engines.ipc.sender import NamedWeights
    from nemo_aapo.engines.weights import WeightsId
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.mcore.model import GPTModel


def build_engine(
    config: Config, policy: MegatronPolicy, shape: ModelShape, decode: Callable[[np.ndarray], str]
) -> RolloutEngine:
    """The trainer's engine. Collective.

    Args:
        policy: whose completions it generates.
        shape: the model's.
        decode: token ids -> text, for stop strings.
    """
    if config.rollout.engine == "remote":
        from nemo_aapo.engines.remote.engine import RemoteEngine

        sender = build_sender(config, policy.module, shape.vocab_size, policy.named_weights)
        return RemoteEngine.from_config(config, sender, vocab_size=shape.vocab_size)
    if config.rollout.engine == "trtllm":
        from nemo_aapo.engines.trtllm.engine import TrtllmEngine

        reserved = 0 if config.rollout.offload_learner else policy.moments_to_come()
        return TrtllmEngine.from_config(config, in_learner=True, policy_version=policy.version, reserved_bytes=reserved)
    if config.rollout.engine == "plain":
        from nemo_aapo.engines.plain import PlainEngine

        budget, multiple = config.rollout.max_concurrent_tokens, pad_multiple(config)
        return PlainEngine(policy.module, shape.vocab_size, budget, policy.version, decode, multiple)
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    rollout = config.rollout
    return MegatronEngine(
        policy.module,
        shape.vocab_size,
        rollout.max_concurrent_tokens,
        policy.version,
        decode,
        record_routes=bool(rollout.replay_routes),
        speculation=rollout.speculation,
    )


def build_sender(config: Config, module: GPTModel, vocab_size: int, named_weights: NamedWeights) -> Sender | None:
    """What hands a model's weights to servers; None: ``rollout.refit`` says by files. Collective.

    Args:
        module: this rank's stage.
        named_weights: makes (Hugging Face name, full tensor) of all weights; collective.
    """
    timeout_s = config.rollout.remote.timeout_s
    if config.rollout.refit == "collective":
        from nemo_aapo.engines.collective.sender import WeightSender

        return WeightSender(module, vocab_size, timeout_s)
    if config.rollout.refit == "ipc":
        from nemo_aapo.engines.ipc.sender import MemorySender

        patience_s = config.cluster.signal_s / 2
        return MemorySender(
            module, vocab_size, named_weights, config.model.path, timeout_s=timeout_s, patience_s=patience_s
        )
    return None


@dataclass(frozen=True)
class HostedEngine:
    """An engine with weights of its own, which come from directories."""

    engine: RolloutEngine
    load: Callable[[Path, int], None]
    """``load(directory, version)``: take over the weights of a Hugging Face directory, bucket by bucket."""
    tensors: frozenset[str]
    """Names of all tensors that such a directory must have."""
    can_break_off: bool
    """``generate`` may be left by an exception of ``on_finish``, and the engine goes on."""
    meeting: Callable[[Rendezvous, WeightsId], AbstractContextManager[Callable[[], int]]] | None = None
    """Meets the trainer's ranks; inside, the call takes what they send, and returns its bytes. None: only files."""
    idle: Callable[[], None] | None = None
    """To be called every few seconds while there is nothing to do; None: nobody waits for that."""
    kv_cache_use: Callable[[], float] = lambda: math.nan
    """Share of the KV cache that is in use now; NaN where the engine does not tell."""
    prompt_tokens: int = 0
    """Prompts that come to what is generated in flight are expected to be no longer: rows have room for so much."""


def build_hosted_engine(config: Config, shape: ModelShape) -> HostedEngine:
    """A server's engine with the base model's weights; on its own ranks, whatever the trainer's layout. Collective."""
    build = _hosted_trtllm if config.rollout.server.engine == "trtllm" else _hosted_megatron
    return build(config, shape)


def _hosted_trtllm(config: Config, shape: ModelShape) -> HostedEngine:
    from nemo_aapo.engines.ipc.receiver import visit
    from nemo_aapo.engines.remote.weight_store import require_architecture
    from nemo_aapo.engines.trtllm.engine import TrtllmEngine
    from nemo_aapo.models.reader import WeightFiles
    from nemo_aapo.models.weights import own_tensors
    from nemo_aapo.utils.safetensors import tensor_headers

    engine = TrtllmEngine.from_config(config)
    tensors = frozenset(own_tensors(tensor_headers(Path(config.model.path)), shape))

    def load(directory: Path, version: int) -> None:
        engine.update_weights(WeightFiles(directory).items(), version)

    @contextmanager
    def meeting(where: Rendezvous, weights: WeightsId) -> Iterator[Callable[[], int]]:
        with visit(where, engine.device_names, config.rollout.remote.timeout_s) as found:
            require_architecture(found.config, config.model.path)
            yield lambda: engine.take_handles(found.buckets(), tensors, weights.policy_version)

    return HostedEngine(engine, load, tensors, can_break_off=False, meeting=meeting)


def _hosted_megatron(config: Config, shape: ModelShape) -> HostedEngine:
    with importing():
        from nemo_aapo.data.tokenizer import load_text
        from nemo_aapo.engines.collective.receiver import WeightReceiver
        from nemo_aapo.engines.ipc.channel import SCHEME
        from nemo_aapo.engines.ipc.receiver import taking
        from nemo_aapo.engines.megatron.engine import MegatronEngine
        from nemo_aapo.mcore import precision
        from nemo_aapo.mcore.bridge.weights import WeightMap
        from nemo_aapo.mcore.groups import initialize_model_parallel
        from nemo_aapo.mcore.model import build_module

    # torch would keep a record of the last 2,000 collectives, 2 MB
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
    server = config.rollout.server
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": server.tensor_parallel_size,
        "pipeline_model_parallel_size": server.pipeline_parallel_size,
        "expert_model_parallel_size": server.expert_parallel_size,
    }
    initialize_model_parallel(**layout, seed=config.seed, timeout_s=config.rollout.remote.timeout_s)
    with_experts_cut = shape.experts is not None and server.tensor_parallel_size > 1  # of which mcore then asks it
    model = dataclasses.replace(
        config.model, **layout, context_parallel_size=1, sequence_parallel=with_experts_cut, recompute_granularity=None
    )
    config = dataclasses.replace(config, model=model)
    weight_map = WeightMap(config.model.path, precision.dtype(config))
    module = build_module(config, weight_map)
    text = load_text(config.model.path, shape.vocab_size, trust_remote_code=config.model.trust_remote_code)
    rollout = config.rollout
    engine = MegatronEngine(
        module,
        shape.vocab_size,
        rollout.max_concurrent_tokens,
        decode=text.decode,
        record_routes=bool(rollout.replay_routes),
        speculation=rollout.speculation,
    )

    def load(directory: Path, version: int) -> None:
        weight_map.load(module, directory)
        engine.update_weights((), version)

    load(Path(config.model.path), 0)
    tensors = frozenset(name for name, _ in weight_map.export(module))
    timeout_s = rollout.remote.timeout_s
    receiver = WeightReceiver(module, shape.vocab_size, rollout.server.index, timeout_s)

    @contextmanager
    def meeting(where: Rendezvous, weights: WeightsId) -> Iterator[Callable[[], int]]:
        met = receiver.meeting(where, weights)
        if where.address.startswith(SCHEME):
            met = taking(where, config.model.path, tensors, functools.partial(weight_map.load, module), timeout_s)
        with met as take:
            yield take
        engine.update_weights((), weights.policy_version)

    return HostedEngine(
        engine,
        load,
        tensors,
        can_break_off=True,
        meeting=meeting,
        kv_cache_use=lambda: engine.kv_cache_use,
        prompt_tokens=config.data.max_prompt_tokens,
    )
