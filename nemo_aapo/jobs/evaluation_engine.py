"""The engine of an evaluation, with the weights that are measured: in process, or on rollout servers. Collective."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from nemo_aapo.config import pad_multiple
from nemo_aapo.conversion import megatron_model
from nemo_aapo.conversion.source import lora_of
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import on_first_rank
from nemo_aapo.engines.base import RolloutEngine
from nemo_aapo.engines.remote.directory import ServerRecord
from nemo_aapo.errors import ConfigError
from nemo_aapo.mcore import precision
from nemo_aapo.models.reader import WeightFiles
from nemo_aapo.prepare.evaluation import EvaluationJob
from nemo_aapo.text.transformers5 import said
from nemo_aapo.utils.safetensors import model_digest

if TYPE_CHECKING:
    from nemo_aapo.mcore.bridge.weights import WeightMap
    from nemo_aapo.mcore.model import GPTModel

PUBLISHED = 1
"""The version that rollout servers know the measured weights by; 0 is their base model."""


def build_engine(
    job: EvaluationJob, decode: Callable[[np.ndarray], str], stack: contextlib.ExitStack, log: Callable[[str], None]
) -> tuple[RolloutEngine, str]:
    """The engine with the weights that are measured, and what tells these from others.

    Args:
        decode: token ids -> text, for stop strings.
        stack: closes the engine.
        log: told on all ranks what is being done.
    """
    if job.settings.rollout.engine == "remote":
        return _on_servers(job, stack, log)
    _, module, digest = _load(job, log)
    budget = job.settings.rollout.max_concurrent_tokens
    if job.settings.rollout.engine == "plain":
        from nemo_aapo.engines.plain import PlainEngine

        log("rollout.engine=plain: each token takes a forward pass over all before it, so sampling is slow")
        multiple = pad_multiple(job.settings)
        return PlainEngine(module, job.shape.vocab_size, budget, decode=decode, multiple=multiple), digest
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    return MegatronEngine(module, job.shape.vocab_size, budget, decode=decode), digest


def _on_servers(
    job: EvaluationJob, stack: contextlib.ExitStack, log: Callable[[str], None]
) -> tuple[RolloutEngine, str]:
    """The same, with the weights handed to rollout servers as a trainer's would be.

    Raises:
        ConfigError: the servers have another client, or compute in another precision.
        RunError: too few of them come, or take these weights; names each and why.
    """
    from nemo_aapo.engines.remote.engine import RemoteEngine

    admit = functools.partial(_require_precision, job.settings.precision.name)
    engine = RemoteEngine.from_config(job.settings, admit=admit, vocab_size=job.shape.vocab_size)
    stack.callback(engine.close)
    log(f"handing {job.source.path} to the rollout servers of {engine.fleet.directory}")
    if job.source.kind == "hf":
        digest = on_first_rank(lambda: model_digest(str(job.source.base)))
        tensors = WeightFiles(job.source.base).items() if parallel.rank() == 0 else ()
        engine.update_weights(tensors, PUBLISHED)
    else:
        weight_map, module, digest = _load(job, log)
        engine.update_weights(weight_map.export(module), PUBLISHED)
    return engine, digest


def _require_precision(wanted: str, server: ServerRecord) -> None:
    if server.precision not in ("", wanted):
        raise ConfigError(
            f"precision.name={wanted}: rollout server {server.index} ({server.address}) computes in "
            f"{server.precision}. Ask for that (precision={server.precision}), or start servers with "
            f"precision={wanted}"
        )


def _load(job: EvaluationJob, log: Callable[[str], None]) -> tuple[WeightMap, GPTModel, str]:
    """The model in this layout, and what tells its weights from others."""
    source = job.source
    weight_map, module = megatron_model.build(source.base, precision.dtype(job.settings), lora_of(source))
    log(f"loading {source.path}{said(source.base)}")
    if source.kind == "hf":
        weight_map.load(module)
        return weight_map, module, on_first_rank(lambda: model_digest(str(source.base)))
    content = megatron_model.load_checkpoint(source, module, log)
    sums = repr(sorted((name, record.sha256) for name, record in content.files.items()))
    return weight_map, module, f"{hashlib.sha256(sums.encode()).hexdigest()[:16]} (step {content.step})"
