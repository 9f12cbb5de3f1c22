"""FP8's products as TransformerEngine's recipes make them, emulated on a CPU.

Inputs and weights of a layer's projections are rounded to e4m3 and back to bf16, and multiplied in bf16. A GPU's
kernels multiply the e4m3 numbers themselves, and add up in another order.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

E4M3_MAX = 448.0
Block = tuple[int, int] | None
"""Rows and columns that have one scale; None: the whole matrix."""
RECIPES: dict[str, tuple[Block, Block]] = {
    "fp8_tensorwise": (None, None),
    "fp8_blockwise": ((1, 128), (128, 128)),
}
"""Precision -> blocks of an input [tokens, in], and of a weight [out, in]."""
PROJECTIONS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""What FP8 computes and adapters adapt: all products of a layer but attention's."""
PRODUCTS = {
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.addmm_.default: 1,
}
"""Product -> number of its argument x [T, in]; the next one is the weight, [out, in] or transposed."""


class Fp8Products(TorchDispatchMode):
    """A context in which a module's projections multiply e4m3 numbers.

    It stands below autograd, modules and the decoder alike, so that engine and learner are quantised by the same lines.
    """

    def __init__(self, module: torch.nn.Module, recipe: str) -> None:
        """Args: recipe: of ``RECIPES``. The module's weights stay as they are, and are not to change."""
        super().__init__()
        self._input_block, block = RECIPES[recipe]
        weights = [m.get_parameter("weight") for name, m in module.named_modules() if name.endswith(PROJECTIONS)]
        self._weights = {weight.data_ptr(): quantize(weight.detach(), block).contiguous() for weight in weights}
        self._met: set[int] = set()

    def __enter__(self) -> Self:
        self._met.clear()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = PRODUCTS.get(function)
        if at is not None and (address := args[at + 1].data_ptr()) in self._weights:
            self._met.add(address)
            asked = args[at + 1]
            weight = self._weights[address].as_strided(asked.size(), asked.stride())
            args = (*args[:at], quantize(args[at], self._input_block), weight, *args[at + 2 :])
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and len(self._met) < len(self._weights):
            raise RuntimeError(f"only {len(self._met)} of {len(self._weights)} weights were met in a known product")


def quantize(x: Tensor, block: Block) -> Tensor:
    """A matrix rounded to e4m3 and back, in its own dtype. Scales are exact: a block's greatest number becomes 448."""
    rows, columns = block or x.shape
    padded = F.pad(x.float(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [., rows, ., columns]
    scale = E4M3_MAX / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12)
    rounded = (blocks * scale).to(torch.float8_e4m3fn).float() / scale
    return rounded.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]].to(x.dtype)
