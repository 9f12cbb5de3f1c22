"""What megatron-core 0.16 needs to run where there is no CUDA device.

megatron-core asks for ``torch.cuda.current_device()`` and for literal ``device="cuda"`` in many places that have
nothing to do with CUDA kernels. ``install()`` answers those with the CPU, and replaces the few functions that insist
on CUDA tensors. It does nothing on a machine with a GPU, where the very same code runs unpatched.

Each patch is one function that says which site needs it; ``tests/mcore/test_cpu.py`` holds one test for each.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
from collections.abc import Iterator

import torch

from nemo_aapo.utils.libraries import import_megatron_core

SUPPORTED_MCORE = "0.16"
"""The release line whose sources the patches were written for."""

MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",  # total_num_tokens
    "megatron.core.optimizer.clip_grads",  # total norm, overflow buffer
    "megatron.core.optimizer.optimizer",  # loss scale
    "megatron.core.transformer.utils",  # default causal mask
    "megatron.core.utils",  # gradient norm without apex
)
"""Modules that create tensors with ``device="cuda"`` spelled out."""

_installed = False


def install() -> None:
    """Make megatron-core usable without CUDA. Idempotent; a no-op where CUDA is present.

    Raises:
        RuntimeError: the installed megatron-core is not of the release line the patches were written for.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _check_version()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore asserts on it for tensor parallelism
    patch_device_queries()
    patch_cuda_literals()
    patch_gradient_clipping()
    patch_optimizer_kernels()
    patch_distributed_optimizer()
    patch_rng_tracker()
    patch_rotary_embedding()
    patch_weight_gradients()
    _installed = True


def _check_version() -> None:
    import_megatron_core()
    from megatron.core import __version__

    if not __version__.startswith(SUPPORTED_MCORE + "."):
        raise RuntimeError(
            f"megatron-core {__version__} is installed, but running without a GPU is supported for "
            f"{SUPPORTED_MCORE}.x only. Install the versions in requirements/."
        )


def patch_device_queries() -> None:
    """``torch.cuda.current_device()`` (rotary embedding, p2p, mappings, layers, buffers), ``synchronize()`` (p2p,
    checkpoint writer) and ``Tensor.cuda()`` (tied embeddings under pipeline parallelism)."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def patch_cuda_literals() -> None:
    """Give the modules with literal ``device="cuda"`` a ``torch`` whose factories read it as the CPU.

    A ``TorchFunctionMode`` would catch all sites at once, but costs 20 to 27 % of a step.
    """
    proxy = _cpu_torch()
    for name in MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).torch = proxy


def _cpu_torch() -> types.ModuleType:
    """A stand-in for the module ``torch``: all its attributes, with factories that map cuda to cpu."""
    proxy = types.ModuleType("torch")
    proxy.__getattr__ = lambda name: getattr(torch, name)

    def on_cpu(factory):
        def create(*args, **kwargs):
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return create

    for name in ("zeros", "ones", "empty", "full", "tensor"):
        setattr(proxy, name, on_cpu(getattr(torch, name)))
    return proxy


@contextlib.contextmanager
def types_as_on_gpu() -> Iterator[None]:
    """Inside, ``Tensor.type()`` gives a CPU tensor the name of its CUDA twin.

    The distributed optimizer sorts parameters by that name when it is made (distrib_optimizer.py:361, :420, :582), and
    knows none without ``cuda`` in it.
    """
    original = torch.Tensor.type

    def named_as_on_gpu(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and not self.is_cuda else found

    torch.Tensor.type = named_as_on_gpu
    try:
        yield
    finally:
        torch.Tensor.type = original


def patch_gradient_clipping() -> None:
    """``clip_grad_by_total_norm_fp32`` asserts on ``torch.cuda.FloatTensor`` (clip_grads.py:167)."""
    from megatron.core.optimizer import clip_grads, optimizer

    def clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, use_decoupled_grad=False):
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        coefficient = max_norm / (total_norm + 1.0e-6)
        if grads and coefficient < 1.0:
            torch._foreach_mul_(grads, coefficient)

    # optimizer.py imported the name, so both modules hold it
    clip_grads.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32
    optimizer.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32


def patch_optimizer_kernels() -> None:
    """Where TransformerEngine or apex is installed without a GPU, mcore takes their Adam and norms, which want one.

    All is set to what it is without those packages (optimizer/__init__.py:34, distrib_optimizer.py:36,
    clip_grads.py:40, optimizer.py:36).
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, base):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def patch_distributed_optimizer() -> None:
    """Loading its state looks for torch's step count among the tensors (distrib_optimizer.py:940), where it is not.

    It was set by then: TransformerEngine's and apex's Adam keep it elsewhere, which is all that mcore thinks of there.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self, model_param, tensors):
        present = self._get_main_param_and_optimizer_states(model_param)
        original(self, model_param, {**{key: present[key] for key in ("step",) if key in present}, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def patch_rng_tracker() -> None:
    """The tensor-parallel RNG tracker and the recompute hooks read and set the CUDA generator's state."""
    from megatron.core.tensor_parallel import random

    def add(self, name, seed):
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} with seed {seed} exists already")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
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
    """mcore's fused rotary embedding is TransformerEngine's; the other, in torch operations, copies much.

    All layouts go by this one function (rope_utils.py:92). The one for packed sequences (rope_utils.py:178) puts angles
    together for it, in each layer anew, which is for nothing where each token has its own already (mcore/packing.py).
    """
    from megatron.core.models.common.embeddings import rope_utils

    from nemo_aapo.mcore.cpu.kernels import rotary

    original, original_packed = rope_utils._apply_rotary_pos_emb_bshd, rope_utils._apply_rotary_pos_emb_thd

    def apply_packed(t, cu_seqlens, freqs, *arguments, **more):
        if len(cu_seqlens) > 2 or len(freqs) != len(t):
            return original_packed(t, cu_seqlens, freqs, *arguments, **more)
        more.pop("cp_group", None)
        return apply(t.unsqueeze(1), freqs, *arguments, **more).squeeze(1)

    def apply(t, freqs, rotary_interleaved=False, multi_latent_attention=False, mscale=1.0):
        if rotary_interleaved or multi_latent_attention or t.shape[-1] != freqs.shape[-1] or t.dtype != freqs.dtype:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        return rotary(t, freqs, mscale)

    rope_utils._apply_rotary_pos_emb_bshd, rope_utils._apply_rotary_pos_emb_thd = apply, apply_packed


def patch_weight_gradients() -> None:
    """mcore's linear layers add weight gradients to the buffer within the product by apex's kernel (layers.py:569).

    ``precision.fuse_weight_gradients`` tells them to; here is that kernel for a CPU.
    """
    from megatron.core.tensor_parallel import layers

    def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
        main_grad.addmm_(grad_output.t(), total_input)

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
