"""TransformerEngine's attention, and beside it that over shared prompts, which it has no kernels for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nemo_aapo.mcore.attention.merged import attend


class Sharing:
    """Goes before one of mcore's attention classes: rows with shared prompts are attended to here, all else there."""

    def __init__(self, config: Any, *arguments: Any, softmax_scale: float | None = None, **more: Any) -> None:
        super().__init__(config, *arguments, softmax_scale=softmax_scale, **more)  # type: ignore[call-arg]
        self._scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *arguments: Any,
        packed_seq_params: Any = None,
        **more: Any,
    ) -> torch.Tensor:
        """With shared prompts: query [t, heads, size], key and value [t, groups, size] -> [t, heads * size]."""
        row = getattr(packed_seq_params, "row", None)
        if row is None or row.shared is None:
            whole = super().forward  # type: ignore[misc]
            return whole(query, key, value, *arguments, packed_seq_params=packed_seq_params, **more)
        return attend(query, key, value, row, self._scale).flatten(1)


@functools.cache
def sharing(attention: type) -> type:
    """The class that attends to rows with shared prompts, too."""
    return type(f"Sharing{attention.__name__}", (Sharing, attention), {})
