"""The policy: a Megatron GPTModel under TP x PP x DP, its optimizer, and the passes that the learner needs.

The passes go through mcore's own pipeline schedules. On the last stage the model hands out hidden states instead of
logits, and ``learner/logprobs.py`` turns them into log-probs chunk by chunk: scoring and training share that one path.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_aapo.config import Config, ModelShape
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.device import device
from nemo_aapo.errors import ConfigError, NonFiniteError
from nemo_aapo.learner.logprobs import selected_logprobs
from nemo_aapo.mcore import precision
from nemo_aapo.mcore.bridge.lora import add_adapters
from nemo_aapo.mcore.bridge.weights import WeightMap
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.optimizer import (
    CHECKPOINT_METADATA,
    build_optimizer,
    build_scheduler,
    data_parallel,
    prepare_to_load,
)
from nemo_aapo.mcore.packing import packed_sequences, rotary_positions
from nemo_aapo.mcore.state import load_model_state, sharded_model_state

TokenLoss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""``loss(logprobs [n], entropy [n], batch)`` -> (this micro-batch's part of the loss, detached sums for metrics)."""


class MegatronPolicy:
    """One policy, spread over the job's ranks. All methods are collective unless they say otherwise."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        """Build the model, load its Hugging Face weights, and make the optimizer.

        Args:
            config: the run's configuration.
            shape: the model's, as ``read_model_dir`` returned it.
        """
        self.config = config = precision.decide(config)
        self.shape = shape
        self.version = 0
        """Optimizer steps taken so far."""
        self.weight_map = WeightMap(config.model.path, precision.dtype(config))
        self.module = build_module(config, shape, self.weight_map)
        self.weight_map.load(self.module)
        if config.model.lora is not None:
            add_adapters(self.module, config.model.lora, config.seed)
        self.fused_weight_gradients = precision.fuse_weight_gradients(self.module)
        """Layers that add their weight gradients to the buffer by themselves."""
        self.model = data_parallel(config, self.module)
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.module.config.grad_scale_func = self.optimizer.scale_loss
        self.module.config.no_sync_func = self.model.no_sync
        # Our token weights hold 1 / (global denominator) already: mcore must neither count tokens nor divide.
        self.module.config.finalize_model_grads_func = lambda model, num_tokens, **kw: finalize_model_grads(model, **kw)
        self._reference: list[torch.Tensor] | None = None

    # ------------------------------------------------------------------ passes

    def train_step(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> dict[str, float]:
        """One optimizer step on this data-parallel rank's micro-batches (the same number on every rank).

        Args:
            batches: this rank's share of the optimizer batch; their weights hold 1 / (global denominator).
            loss: summed over all micro-batches of all ranks it is the loss.

        Returns:
            The loss, ``grad_norm`` (before clipping), ``lr``, and the loss function's sums over all ranks (keys that
            start with ``min/`` are minima).

        Raises:
            NonFiniteError: on all ranks, before any weight is touched.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batches, functools.partial(_loss_part, loss), forward_only=False)
        sums = self._reduce(outputs)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.clip_grad_norm(self.config.model.optim.clip_grad))
        if not math.isfinite(sums["loss"]) or not math.isfinite(grad_norm):
            raise NonFiniteError(f"loss {sums['loss']}, gradient norm {grad_norm}")
        self.scheduler.step(1)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step_with_ready_grads()
        self.version += 1
        return {**sums, "grad_norm": grad_norm, "lr": lr}

    def finish_updates(self) -> None:
        """Have the updated weights in place; with ``overlap_param_gather`` the next forward pass would gather them."""
        if self.config.model.optim.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Log-probs of the completion tokens at the sampling temperature, without gradients.

        Returns:
            float32 [n] for each micro-batch, in the order of its targets, on every rank of the model-parallel group.
        """
        outputs = self._run(batches, lambda logprobs, entropy, batch: logprobs.cpu().numpy(), forward_only=True)
        return parallel.broadcast_from_last_stage(outputs)

    def _run(self, batches: Sequence[MicroBatch], finish: Callable[..., Any], *, forward_only: bool) -> list[Any]:
        """All micro-batches through the pipeline; what ``finish`` returned for each, on the last stage."""

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
            batch = next(iterator)
            packing = None if batch.cu_seqlens is None else packed_sequences(batch)
            with hidden_states_out(self.module), rotary_positions(self.module, batch):
                hidden = model(batch.input_ids, batch.position_ids, None, packed_seq_params=packing)

            def on_last_stage(hidden: torch.Tensor, non_loss_data: bool = False):
                return finish(*self._logprobs(hidden, batch), batch)

            return hidden, on_last_stage

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=max(batch.input_ids.shape[1] for batch in batches),
            micro_batch_size=max(batch.input_ids.shape[0] for batch in batches),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _logprobs(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [s, b, h] (cut along s under sequence parallelism) -> log-probs and entropy [n]."""
        if self.config.model.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        weight = output_weight(self.module)
        selected = hidden.flatten(0, 1).index_select(0, batch.positions)
        return selected_logprobs(
            selected.to(weight.dtype),
            weight,
            batch.targets,
            temperature=self.config.rollout.temperature,
            vocab_size=self.shape.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            vocab_start=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
            chunk_tokens=self.config.model.logprob_chunk_tokens,
        )

    def _reduce(self, outputs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """The micro-batches' sums (and minima), over all ranks, in one fixed order."""
        local = _merge([{key: float(value) for key, value in output.items()} for output in outputs])
        return _merge(parallel.gather_data_parallel(parallel.broadcast_from_last_stage(local)))

    # ------------------------------------------------------------------ weights

    def keep_reference(self) -> None:
        """Remember the present weights as the frozen reference (a copy of this rank's part, in host memory).

        Only of the weights that are trained: those below adapters stay what they are.

        Called before the first update, or after ``load_base_weights``.
        """
        self._reference = [parameter.detach().cpu().clone() for parameter in self._trained()]

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Inside, the model computes with the reference's weights; afterwards the policy's are back, bit for bit."""
        if self._reference is None:
            raise RuntimeError("keep_reference() was not called: there are no reference weights")
        parameters = self._trained()
        policy = [parameter.data.clone() for parameter in parameters]
        try:
            for parameter, frozen in zip(parameters, self._reference, strict=True):
                parameter.data.copy_(frozen)
            yield
        finally:
            for parameter, kept in zip(parameters, policy, strict=True):
                parameter.data.copy_(kept)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor), for refit and export."""
        return self.weight_map.export(self.module)

    def export(self, directory: str) -> None:
        """Write a Hugging Face model directory."""
        self.weight_map.save(self.module, directory)

    # ------------------------------------------------------------------ checkpoints

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and scheduler for mcore's dist_checkpointing: loads under any TP x PP x DP."""
        if is_loading:
            prepare_to_load(self.optimizer)
        model = sharded_model_state(self.module)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=CHECKPOINT_METADATA),
            "scheduler": self.scheduler.state_dict(),
            "version": self.version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``dist_checkpointing.load`` read into ``sharded_state_dict(is_loading=True)``."""
        load_model_state(self.module, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.num_steps = 0  # mcore adds the loaded steps to it
        self.scheduler.load_state_dict(state["scheduler"])
        self.version = state["version"]


def build_module(config: Config, shape: ModelShape, weight_map: WeightMap) -> GPTModel:
    """This rank's stage of the model, with random weights.

    Raises:
        ConfigError: the vocabulary can't be cut over the tensor-parallel ranks.
    """
    model = config.model
    fields = {
        **precision.model_fields(config),
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "context_parallel_size": model.context_parallel_size,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        "recompute_granularity": model.recompute_granularity,
        "recompute_method": "uniform" if model.recompute_granularity == "full" else None,
        "recompute_num_layers": 1 if model.recompute_granularity == "full" else None,
        "recompute_modules": list(model.recompute_modules),
    }
    return build_stage(weight_map, fields)


def build_stage(weight_map: WeightMap, fields: Mapping[str, Any]) -> GPTModel:
    """This rank's stage of the model, with random weights.

    Args:
        fields: of the Bridge's provider: precision and layout.

    Raises:
        ConfigError: as ``build_module``.
    """
    provider = weight_map.provider()
    fields = {
        **fields,
        # The weights come from the model directory, but mcore marks tensor-parallel parameters in the same breath
        # as it initialises them, and the gradient norm counts unmarked ones on one rank only.
        "perform_initialization": True,
        "hidden_dropout": 0.0,  # the sampled policy and the trained one must be the same function
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,  # neither the schedule nor DDP divides the loss
        "variable_seq_lengths": True,  # micro-batches differ in length
        "moe_token_dispatcher_type": "alltoall",  # mcore wants it with variable lengths, dense models included
        "batch_p2p_comm": True,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": True,
        "parallel_output": True,
    }
    for name, value in fields.items():
        setattr(provider, name, value)
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()  # Gemma's provider asks it for the stage
    provider.finalize()
    if provider.vocab_size % provider.tensor_model_parallel_size:
        raise ConfigError(
            f"model.tensor_model_parallel_size={provider.tensor_model_parallel_size} does not divide the vocabulary "
            f"of {provider.vocab_size} entries"
        )
    module = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
    )
    return module.to(device())


def _loss_part(loss: TokenLoss, logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch):
    """mcore's three-part form: the loss, a number of tokens (unused: see finalize_model_grads_func), what to report.

    The loss is cloned for the report, since the schedule works on the original in place.
    """
    value, sums = loss(logprobs, entropy, batch)
    tokens = torch.tensor(batch.targets.numel(), dtype=torch.int, device=value.device)
    return value, tokens, {"loss": value.detach().clone(), **sums}


def _merge(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums key by key; minima for keys that start with ``min/``."""
    merged: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            if key not in merged:
                merged[key] = value
            else:
                merged[key] = min(merged[key], value) if key.startswith("min/") else merged[key] + value
    return merged


def output_weight(module: GPTModel) -> torch.Tensor:
    """This rank's rows [vocabulary / TP, h] of the output layer; last stage only."""
    if module.share_embeddings_and_output_weights:
        return module.shared_embedding_or_output_weight()
    return module.output_layer.weight


@contextlib.contextmanager
def hidden_states_out(module: GPTModel) -> Iterator[None]:
    """Inside, the last stage returns its normalised hidden states [s, b, h] and skips the output layer.

    ``GPTModel._postprocess`` returns early for a model that is not the last stage; the final norm belongs to the
    decoder block, which keeps its own flag.
    """
    post_process = module.post_process
    module.post_process = False
    try:
        yield
    finally:
        module.post_process = post_process
