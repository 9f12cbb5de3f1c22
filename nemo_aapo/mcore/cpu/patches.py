"""What megatron-core needs to run where there is no CUDA device.

``install()`` answers what mcore asks of CUDA (``fake_torch.py``) and replaces the few functions that insist on CUDA
tensors. ``mcore/replaced.py`` lists them with the sources that they replace; each patch says here which site needs it,
and ``tests/mcore/test_cpu.py`` holds one test for each. On a machine with a GPU the very same code runs unpatched.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from nemo_aapo.mcore import replaced
from nemo_aapo.mcore.cpu import fake_torch
from nemo_aapo.mcore.cpu.kernels import l2_norm, rotary

_installed = False


def install() -> None:
    """Make megatron-core usable on this machine. Idempotent.

    Raises:
        DriftError: a function that is changed here is not the one that its change was written for; nothing was changed.
    """
    global _installed
    if _installed:
        return
    replaced.check(replaced.EVERYWHERE)
    if not torch.cuda.is_available():
        replaced.check(replaced.ON_CPU)
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore asserts on it for tensor parallelism
        fake_torch.give(fake_torch.MODULES)
        patch_shared_embeddings()
        patch_gradient_clipping()
        patch_optimizer_kernels()
        patch_distributed_optimizer()
        patch_rng_tracker()
        patch_rotary_embedding()
        patch_weight_gradients()
        patch_experts()
    _installed = True


def patch_shared_embeddings() -> None:
    """The stages that share an embedding sum up their copies of it, after ``Tensor.cuda()`` (language_module.py:244).

    mcore's function runs as if this stage had no share in it; the sum comes afterwards.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    original = LanguageModule.setup_embeddings_and_output_layer

    def setup_embeddings_and_output_layer(self: Any) -> None:
        self._is_in_embd_group = lambda: False
        try:
            original(self)
        finally:
            del self._is_in_embd_group
        is_cut = self.config.pipeline_model_parallel_size > 1 and dist.is_initialized()
        if self.share_embeddings_and_output_weights and is_cut and self._is_in_embd_group():
            dist.all_reduce(self.shared_embedding_or_output_weight().data, group=self.embd_group)

    LanguageModule.setup_embeddings_and_output_layer = setup_embeddings_and_output_layer


@contextlib.contextmanager
def types_as_on_gpu(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, ``type()`` of these parameters is the name of their CUDA twins' type.

    The distributed optimizer sorts parameters by that name when it is made (distrib_optimizer.py:361, :420, :582), and
    knows none without ``cuda`` in it. Each parameter gets an attribute that hides the method: tensors as such, and
    other parameters, are left alone.
    """
    named = list(parameters)
    for parameter in named:
        name = parameter.type().replace("torch.", "torch.cuda.", 1)
        vars(parameter)["type"] = lambda name=name: name
    try:
        yield
    finally:
        for parameter in named:
            del vars(parameter)["type"]


def patch_gradient_clipping() -> None:
    """``clip_grad_by_total_norm_fp32`` asserts on ``torch.cuda.FloatTensor`` (clip_grads.py:167)."""
    from megatron.core.optimizer import clip_grads, optimizer

    def clip_grad_by_total_norm_fp32(
        parameters: torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        total_norm: float,
        use_decoupled_grad: bool = False,
    ) -> None:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        coefficient = max_norm / (total_norm + 1.0e-6)
        if grads and coefficient < 1.0:
            torch._foreach_mul_(grads, coefficient)

    # optimizer.py imported the name, so both modules hold it
    clip_grads.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32
    optimizer.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32


def patch_optimizer_kernels() -> None:
    """Where TransformerEngine or apex is installed without a GPU, mcore takes their Adam and copies, which want one.

    All is set to what it is without those packages (optimizer/__init__.py:34, distrib_optimizer.py:36,
    clip_grads.py:40, optimizer.py:36), but for the norm: mcore's own loses digits with the size of a tensor.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    clip_grads.l2_norm_impl = lambda chunk_size, noop_flag, tensors, per_tensor: (l2_norm(tensors[0]), None)
    for module in (clip_grads, base):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def patch_distributed_optimizer() -> None:
    """Saving its state gathers it by ``Tensor.cuda()`` (distrib_optimizer.py:1089), unless it is told to use gloo.

    Loading looks for torch's step count among the tensors (distrib_optimizer.py:940), where it is not. It was set by
    then: TransformerEngine's and apex's Adam keep it elsewhere, which is all that mcore thinks of there.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original, gather = (
        DistributedOptimizer._set_main_param_and_optimizer_states,
        DistributedOptimizer.get_parameter_state_dp_zero,
    )

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        present = self._get_main_param_and_optimizer_states(model_param)
        original(self, model_param, {**{key: present[key] for key in ("step",) if key in present}, **tensors})

    def get_states(
        self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[str | int, Any] | None:
        return gather(self, True, empty_data, return_on_all_ranks)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.get_parameter_state_dp_zero = get_states


def patch_rng_tracker() -> None:
    """The tensor-parallel RNG tracker and the recompute hooks read and set the CUDA generator's state."""
    from megatron.core.tensor_parallel import random

    def add(self: Any, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} with seed {seed} exists already")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise ValueError(f"random state {name!r} was not added")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    # mcore makes new trackers when groups are made anew, so the class is patched and not one object
    random.CudaRNGStatesTracker.add = add
    random.CudaRNGStatesTracker.fork = fork
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def patch_rotary_embedding() -> None:
    """mcore's fused rotary embedding is TransformerEngine's; the other, in torch operations, copies much, and turns
    bf16 by cosines that are rounded to it. This one turns it in float32, as TransformerEngine's does (fused_rope.cu).

    All layouts go by this one function (rope_utils.py:92). The one for packed sequences (rope_utils.py:178) puts angles
    together for it, in each layer anew, which is for nothing where each token has its own already (mcore/packing.py).
    """
    from megatron.core.models.common.embeddings import rope_utils

    original, original_packed = rope_utils._apply_rotary_pos_emb_bshd, rope_utils._apply_rotary_pos_emb_thd

    def apply_packed(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *arguments: Any, **more: Any
    ) -> torch.Tensor:
        if len(cu_seqlens) > 2 or len(freqs) != len(t):
            return original_packed(t, cu_seqlens, freqs, *arguments, **more)
        more.pop("cp_group", None)
        return apply(t.unsqueeze(1), freqs, *arguments, **more).squeeze(1)

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        *,
        mscale: float = 1.0,
        **of_latent: bool | None,  # latent attention, by a name that mcore has changed
    ) -> torch.Tensor:
        plain = not (rotary_interleaved or any(of_latent.values()))
        if plain and t.shape[-1] == freqs.shape[-1]:
            return rotary(t, freqs, mscale) if t.dtype == freqs.dtype else rotary(t.float(), freqs, mscale).to(t.dtype)
        return original(t, freqs, rotary_interleaved, mscale=mscale, **of_latent)

    rope_utils._apply_rotary_pos_emb_bshd, rope_utils._apply_rotary_pos_emb_thd = apply, apply_packed


def patch_weight_gradients() -> None:
    """mcore's linear layers add weight gradients to the buffer within the product by apex's kernel (layers.py:569).

    ``precision.fuse_weight_gradients`` tells them to; here is that kernel for a CPU.
    """
    from megatron.core.tensor_parallel import layers

    def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.addmm_(grad_output.t(), total_input)

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)


def patch_experts() -> None:
    """The dispatcher of tokens to experts copies its counts to the host on a CUDA stream of its own
    (token_dispatcher.py:436, :833), and without TransformerEngine the router's product asks for a kernel by a name
    that nobody has defined (moe_utils.py:1192). Where a rank holds all experts, tokens lie in their order already, and
    are cut up and joined again for nothing (token_dispatcher.py:704, :762).
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    dispatcher, sort = token_dispatcher.MoEAlltoAllTokenDispatcher, token_dispatcher.sort_chunks_by_idxs

    def sort_chunks(
        tokens: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bool((sorted_idxs[1:] > sorted_idxs[:-1]).all()):
            return tokens, probs
        return sort(tokens, split_sizes, sorted_idxs, probs, fused)

    def counts_as_numbers(self: Any, point: str, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        for name in ("input_splits", "output_splits"):
            if isinstance(counts := getattr(self, name), torch.Tensor):
                setattr(self, name, counts.tolist())
        return tokens_per_expert

    dispatcher.cuda_dtoh_stream = "none: there is nothing to copy"
    dispatcher._maybe_dtoh_and_synchronize = counts_as_numbers
    token_dispatcher.sort_chunks_by_idxs = sort_chunks
    moe_utils.te_general_gemm = None
