"""Logits of a base model with an adapter directory on it, as the library ``peft`` computes them.

python -m tests.peers.peft_run BASE ADAPTER OUTPUT.npy        with .venv-peers on PYTHONPATH
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(base: str, adapter: str, output: str) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    np.save(output, model(torch.arange(2, 22)[None]).logits[0].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
