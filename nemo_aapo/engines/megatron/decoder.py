"""A forward pass of an mcore GPTModel's weights as rollouts need it: no gradients, no modules, a packed batch.

mcore's own forward pass is made for training: it wraps each projection and each residual into an autograd function,
switches random states, adds biases and offsets that are zero. A large batch hides that cost, but a decoding step of 64
tokens of a small model spends more than half of its time there. It would also have to be called in evaluation mode with
sequence parallelism off, on a model that the learner trains. ``Decoder`` reads the weights where the learner keeps them
and leaves everything else alone.

Where the learner computes in FP8, rollouts are in bf16 all the same: FP8 kernels want row counts that a decoding step
doesn't have. The parity gate measures how far that moves the log-probs.

``Decoder`` knows one kind of layer: RMSNorms, rotary attention with windows or without, a gated feed-forward part or a
choice of experts (``experts/``), norms of what is added where there are any. It refuses others by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.megatron.experts.layer import ExpertLayers, swiglu
from nemo_aapo.engines.megatron.experts.lockstep import Lockstep
from nemo_aapo.engines.megatron.kv_cache import Attention, KVCache
from nemo_aapo.engines.megatron.matmul import Adapted, Weight, add_linear_, linear, pack_weight
from nemo_aapo.mcore.bridge import families
from nemo_aapo.mcore.bridge.layer_weights import layer_weights
from nemo_aapo.mcore.bridge.lora import adapter_weights, is_adapted, merged_weight
from nemo_aapo.mcore.groups import gather_columns
from nemo_aapo.mcore.model import GPTModel, output_weight


def geglu(gate_and_up: Tensor) -> Tensor:
    """[T, 2 f] -> gelu(gate) * up [T, f], gelu by its approximation with tanh."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


GATED = {"silu": swiglu, "gelu_pytorch_tanh": geglu}
"""What the feed-forward part makes of gate and up, by transformers' name of the activation."""


class Decoder:
    """The forward pass of one pipeline stage, built for one ``generate`` call: it holds references to the weights.

    For as long as the call takes, it also holds copies: merged weights of layers with a LoRA adapter in float32, and
    packed ones of large weights with ``pack``. In bfloat16, an adapter is applied apart, as the learner does: added to
    the weight, an update below the weight's last bit would be lost.
    """

    def __init__(self, model: GPTModel, pack: bool = False, lockstep: Lockstep | None = None) -> None:
        """
        Args:
            model: this rank's stage, unwrapped.
            pack: copy the large weights into the layout that products on a CPU are fast with (``matmul``). It takes as
                much memory as they do, and the time of a few decoding steps. Experts stay as they are: they are most
                of a model, and each has few rows.
            lockstep: the data-parallel ranks that have to call ``layers`` or ``lend_experts`` together.

        Raises:
            ValueError: a kind of model that ``check_supported`` refuses.
        """
        check_supported(model)
        self._model, self._config = model, model.config
        convert = pack_weight if pack else _as_it_is
        projection = functools.partial(_projection, convert=convert)
        self._layers = [layer_weights(layer, projection, self._gain) for layer in model.decoder.layers]
        self._gated = GATED[families.activation(self._config)]
        self._output = convert(output_weight(model)) if model.post_process else None
        attention = model.decoder.layers[0].self_attention
        self.key_value_heads = attention.num_query_groups_per_partition
        self.queries_per_key = attention.num_attention_heads_per_partition // self.key_value_heads
        self.head_size = attention.hidden_size_per_attention_head
        self._root_epsilon = torch.tensor(self._config.layernorm_epsilon**0.5)
        self._tp_group = parallel.groups().tensor
        self._tp_size = dist.get_world_size(self._tp_group)
        self._experts = ExpertLayers(model, lockstep) if self._config.num_moe_experts else None

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for this stage. rows: sequences at a time. length: tokens that one of them may have."""
        return KVCache(
            rows=rows,
            length=length,
            heads=self.key_value_heads,
            head_size=self.head_size,
            queries_per_key=self.queries_per_key,
            angles=families.layer_angles(self._model, length),
            windows=[families.window(self._config, layer.layer_number) for layer in self._model.decoder.layers],
            scale=self._config.softmax_scale or self.head_size**-0.5,
            dtype=self._layers[0].attention_norm.dtype,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [T] -> hidden states [T, h]; first stage only."""
        embedding = self._model.embedding.word_embeddings
        if self._tp_size == 1:
            return self._scaled(F.embedding(tokens, embedding.weight))
        local = tokens - embedding.vocab_start_index
        elsewhere = (local < 0) | (local >= len(embedding.weight))
        hidden = F.embedding(local.masked_fill(elsewhere, 0), embedding.weight).masked_fill_(elsewhere[:, None], 0.0)
        dist.all_reduce(hidden, group=self._tp_group)
        return self._scaled(hidden)

    def _scaled(self, hidden: Tensor) -> Tensor:
        scale = self._config.embedding_scale
        return hidden if scale == 1.0 else hidden.mul_(scale)

    def layers(self, hidden: Tensor, cache: Attention, routes: list[Tensor] | None = None) -> Tensor:
        """Pass hidden states through this stage's layers.

        Args:
            hidden: [T, h], overwritten.
            cache: laid out for these tokens by ``KVCache.begin``.
            routes: takes the experts of each layer, int64 [T, k]; on the last stage those of the last layer are [rows,
                k], as what is returned.

        Returns:
            [T, h]; on the last stage [rows, h], only the tokens whose logits are wanted.
        """
        for index, layer in enumerate(self._layers):
            mixed = linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
            mixed = mixed.view(len(hidden), self.key_value_heads, -1, self.head_size)
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key, value = mixed.split((self.queries_per_key, 1, 1), dim=2)
                query, key = self._norm_heads(query, layer.query_norm), self._norm_heads(key, layer.key_norm)
                mixed = torch.cat((query, key, value), dim=2)
            context = cache.attend(index, mixed)
            if self._is_last(index) and cache.logits_at is not None:
                # After the last attention only the tokens whose logits are wanted are read any more.
                hidden, context = hidden[cache.logits_at], context[cache.logits_at]
            hidden = self._add(hidden, context, layer.projection, layer.attention_post_norm)
            x = self._norm(hidden, layer.mlp_norm)
            if layer.experts is not None and self._experts is not None:
                choice = self._experts.choose(x, layer.experts.router)
                hidden += self._experts.apply(x, choice, layer.experts, self._is_last(index))
                if routes is not None:
                    routes.append(choice.experts)
            else:
                assert layer.gate_and_up is not None
                assert layer.down is not None
                hidden = self._add(hidden, self._gated(linear(x, layer.gate_and_up)), layer.down, layer.mlp_post_norm)
        return hidden

    def lend_experts(self) -> None:
        """This rank's part in ``layers`` when it has no tokens itself: its experts, for those of other ranks."""
        for index, layer in enumerate(self._layers):
            if layer.experts is not None and self._experts is not None:
                self._experts.lend(layer.experts, self._is_last(index))

    def _is_last(self, index: int) -> bool:
        """True for the model's last layer, whose experts see only the tokens whose logits are wanted."""
        return index == len(self._layers) - 1 and self._model.post_process

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, h] -> logits [rows, padded vocabulary]; last stage only.

        On a GPU they are float32, as the learner's are (learner/logprobs.py): rounding them to bfloat16 would move the
        engine's log-probs away from the learner's by more than all else together.
        """
        normed = self._norm(hidden, self._gain(self._model.decoder.final_layernorm.weight))
        weight = self._output
        assert weight is not None, "only the last stage has an output layer"
        if normed.is_cuda and normed.dtype != torch.float32:
            logits = torch.mm(normed, weight.t(), out_dtype=torch.float32)
        else:
            logits = linear(normed, weight)
        return logits if self._tp_size == 1 else gather_columns(logits)

    def addresses(self) -> tuple[int, ...]:
        """Addresses of a whole dense model's weights. A CUDA graph is valid as long as they don't change."""
        model = self._model
        parts = [getattr(layer, field.name) for layer in self._layers for field in fields(layer)]
        weights = [tensor for part in parts for tensor in (part if isinstance(part, Adapted) else (part,))]
        weights += [model.embedding.word_embeddings.weight, model.decoder.final_layernorm.weight, self._output]
        return tuple(weight.data_ptr() for weight in weights if isinstance(weight, Tensor))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_cuda:
            from nemo_aapo.engines.megatron.kernels import decode_triton  # triton comes with torch's CUDA builds only

            return decode_triton.rms_norm(x, weight, self._config.layernorm_epsilon)
        if x.dtype == torch.float32:
            return _rms_norm(x, weight, self._root_epsilon)
        return F.rms_norm(x, weight.shape, weight, self._config.layernorm_epsilon)

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        """Queries or keys [T, key-value heads, n, head size], each head normalised, or those of a token together."""
        if len(weight) == self.head_size:
            return self._norm(x, weight)
        return self._norm(x.reshape(len(x), -1), weight).view(x.shape)

    def _gain(self, weight: Tensor) -> Tensor:
        """What a norm multiplies by; Gemma's weights are the difference to 1."""
        return 1 + weight if self._config.layernorm_zero_centered_gamma else weight

    def _add(self, hidden: Tensor, x: Tensor, weight: Weight, post_norm: Tensor | None) -> Tensor:
        """``hidden + x weight^T``, in place, what is added normalised if there is a norm for it.

        ``x`` and ``weight`` are sharded over the tensor-parallel ranks.
        """
        if self._tp_size == 1 and post_norm is None:
            return add_linear_(hidden, x, weight)
        part = linear(x, weight)
        if self._tp_size > 1:
            dist.all_reduce(part, group=self._tp_group)
        return hidden.add_(part if post_norm is None else self._norm(part, post_norm))


def _rms_norm(x: Tensor, weight: Tensor, root_epsilon: Tensor) -> Tensor:
    """``F.rms_norm`` of float32 in fewer operations. root_epsilon: the square root of epsilon, a tensor of shape []."""
    root_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(weight.numel() ** -0.5)
    return x.div(torch.hypot(root_mean, root_epsilon)).mul_(weight)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _projection(module: Any, convert: Callable[[Tensor], Tensor]) -> Weight:
    """A projection's weight after ``convert``, its adapter merged; in bfloat16 the adapter stays beside it."""
    if is_adapted(module):
        base = module.to_wrap.get_parameter("weight")
        if base.dtype == torch.bfloat16:
            return Adapted(base, *adapter_weights(module))
    return convert(merged_weight(module))


def check_supported(model: GPTModel) -> None:
    """Refuse models that compute something else than ``Decoder`` does.

    Raises:
        ValueError: names each setting of the model that is not supported, with its value.
    """
    config = model.config
    found = {
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "multi_latent_attention": (config.multi_latent_attention, False),
        "softmax_type": (config.softmax_type, "vanilla"),
        "no_rope_freq": (config.no_rope_freq, None),
        "attention_output_gate": (config.attention_output_gate, False),
        "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, False),
        "normalization": (config.normalization, "RMSNorm"),
        "add_bias_linear": (config.add_bias_linear, False),
        "gated_linear_unit": (config.gated_linear_unit, True),
        "activation_func in GATED": (families.activation(config) in GATED, True),
        "activation_func_clamp_value": (config.activation_func_clamp_value, None),
        "glu_linear_offset": (config.glu_linear_offset, 0.0),
        "fp32_residual_connection": (config.fp32_residual_connection, False),
        "mtp_num_layers": (config.mtp_num_layers or None, None),
        "virtual_pipeline_model_parallel_size": (config.virtual_pipeline_model_parallel_size, None),
        "num_query_groups % tensor_model_parallel_size": (
            config.num_query_groups % config.tensor_model_parallel_size,
            0,
        ),
    }
    if config.num_moe_experts:
        found |= expert_settings(config)
    wrong = [f"{name}={value!r} (only {wanted!r})" for name, (value, wanted) in found.items() if value != wanted]
    if wrong:
        raise ValueError(f"the Megatron rollout engine can't decode a model with {', '.join(wrong)}")


def expert_settings(config: Any) -> dict[str, tuple[Any, Any]]:
    """What decides how experts are chosen and weighted, or where they are: (value, the one that is supported)."""
    tensor, expert = config.tensor_model_parallel_size, config.expert_model_parallel_size
    return {
        "moe_router_score_function": (config.moe_router_score_function, "softmax"),
        "moe_router_load_balancing_type": (config.moe_router_load_balancing_type, "none"),
        "moe_router_num_groups": (config.moe_router_num_groups, None),
        "moe_router_topk_scaling_factor": (config.moe_router_topk_scaling_factor, None),
        "moe_router_enable_expert_bias": (config.moe_router_enable_expert_bias, False),
        "moe_shared_expert_intermediate_size": (config.moe_shared_expert_intermediate_size, None),
        "moe_layer_freq": (config.moe_layer_freq, 1),
        "moe_expert_capacity_factor": (config.moe_expert_capacity_factor, None),
        "moe_apply_probs_on_input": (config.moe_apply_probs_on_input, False),
        "moe_latent_size": (config.moe_latent_size, None),
        "expert_tensor_parallel_size": (config.expert_tensor_parallel_size, 1),
        "max(expert, tensor parallel size) % min(expert, tensor parallel size)": (
            max(expert, tensor) % min(expert, tensor),
            0,
        ),
    }
