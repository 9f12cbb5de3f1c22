"""Before a run with ``model.share_prompts`` on a GPU: does its attention there compute what it is to compute?"""

from __future__ import annotations

import numpy as np
import torch

from nemo_aapo.errors import ConfigError
from nemo_aapo.learner.microbatch import PrefixGroup, collate
from nemo_aapo.mcore.model import GPTModel
from nemo_aapo.mcore.packing import packed_sequences
from nemo_aapo.types import Sample

MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""By the dtype of the weights: norm of the difference over that of the values. A token that is seen in vain, or isn't,
makes a tenth."""
LENGTHS = ((300, (40, 1, 200)), (1, (130, 60)), (513, (64, 64, 64, 9)), (70, (33,)))
"""Tokens of a prompt, and of the completions that share it."""


def check_shared_prompts(module: GPTModel) -> None:
    """Compare attention over shared prompts with that over whole sequences: results and gradients, in the first layer.

    Raises:
        ConfigError: they differ by more than ``MAX_DIFFERENCE``, the kernels fail, or the model has a window.
    """
    if module.config.window_size:
        raise ConfigError(
            "model.share_prompts=true: the model has a sliding window, which attention over shared prompts does not "
            "know on a GPU; set it to false"
        )
    try:
        differences = shared_prompt_differences(module)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.share_prompts=true: attention over shared prompts fails on this machine: {error}; set it to false"
        ) from error
    limit = MAX_DIFFERENCE[next(module.parameters()).dtype]
    if not all(value <= limit for value in differences.values()):  # NaN is not
        found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        raise ConfigError(
            "model.share_prompts=true: on this machine attention over shared prompts is not that over whole sequences; "
            f"relative differences: {found} (at most {limit:.0e}). Set it to false, and report this with the versions "
            "of torch and CUDA and the GPU's name"
        )


def shared_prompt_differences(module: GPTModel) -> dict[str, float]:
    """Norm of the difference over norm of the right values: of the result, and of the gradients of what goes in."""
    layer, parameter = module.decoder.layers[0].self_attention, next(module.parameters())
    device, dtype = parameter.device, parameter.dtype
    samples = [
        [Sample(np.ones(p, np.int32), np.ones(n, np.int32), np.zeros(n, np.float32), 1.0) for n in completions]
        for p, completions in LENGTHS
    ]
    together = [PrefixGroup(tuple(group)) for group in samples]
    apart = [PrefixGroup((sample,)) for group in samples for sample in group]
    shared, whole = (
        collate(groups, np.ones(len(apart)), multiple=1, device=device, packed=True) for groups in (together, apart)
    )
    assert shared.expand is not None and shared.contract is not None  # noqa: PT018, some prompts are shared
    heads = (layer.num_attention_heads_per_partition, *[layer.num_query_groups_per_partition] * 2)
    size, tokens = layer.hidden_size_per_attention_head, shared.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(tokens, n, size, generator=generator).to(device).requires_grad_() for n in heads]
    upstream = torch.randn(tokens, heads[0] * size, generator=generator).to(device)

    def attended(row: torch.Tensor | None) -> list[torch.Tensor]:
        tensors = [(x if row is None else x.index_select(0, row)).to(dtype) for x in given]
        packing = packed_sequences(shared if row is None else whole)
        out = layer.core_attention(*tensors, None, attn_mask_type=layer.attn_mask_type, packed_seq_params=packing)
        out = out.float().flatten(1)
        out = out if row is None else out.index_select(0, shared.contract)
        return [out.detach(), *torch.autograd.grad(out, given, upstream)]

    pairs = zip(("result", "query", "key", "value"), attended(None), attended(shared.expand), strict=True)
    return {name: float((found - right).norm() / right.norm()) for name, found, right in pairs}
