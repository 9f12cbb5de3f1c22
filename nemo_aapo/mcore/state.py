"""A module's weights as a checkpoint has them: under names that do not depend on layers, layout or adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_aapo.mcore.bridge.lora import ADAPTER, is_adapted

EXTRA_STATE = "_extra_state"
"""torch's name for what a module keeps besides tensors."""


def sharded_model_state(module: GPTModel) -> dict[str, Any]:
    """The module's weights by name, as mcore's dist_checkpointing takes them.

    TransformerEngine's FP8 state is left out: it is a pickle, and loading it may run code. Only delayed scaling needs
    it; its maxima are found anew after a resume.
    """
    return {name: part for name, part in module.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)}


def load_model_state(module: GPTModel, state: dict[str, Any]) -> None:
    """Take over what was read into ``sharded_model_state(module)``.

    mcore's state names an adapted layer's own tensors as if it had no adapter, so that base model and adapted model
    share names; torch names them by the wrapper.
    """
    absent = {name: torch.empty(0) for name in module.state_dict() if name.endswith(EXTRA_STATE)}
    wrapped = [name + "." for name, part in module.named_modules() if is_adapted(part)]
    module.load_state_dict({_with_wrapper(name, wrapped): value for name, value in {**state, **absent}.items()})


def _with_wrapper(name: str, wrapped: Iterable[str]) -> str:
    for prefix in wrapped:
        if name.startswith(prefix) and not name.startswith(prefix + ADAPTER[1:]):
            return f"{prefix}to_wrap.{name.removeprefix(prefix)}"
    return name
