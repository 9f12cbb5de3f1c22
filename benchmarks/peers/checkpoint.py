"""Random checkpoints, a tokenizer and prompts for both sides.

How often a random model generates the end of sequence is a matter of chance. Here it has a given probability at every
position: one component of the hidden state is kept constant (the embedding sets it, no layer writes to it), and only
the end of sequence's logit reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.plan import Lengths, Model, Plan, Pretrained
from nemo_aapo.utils.files import write_atomic

EOS, PAD, FIRST_WORD = 1, 0, 2
CONSTANT = 0
"""Index of the hidden state's constant component."""
NEVER = -50.0
"""A bias that makes a token practically impossible."""


def make_input(model: Model | Pretrained, plan: Plan, lengths: Lengths, place: Path) -> dict[str, str]:
    """What the contestants train: the paths of a Hugging Face directory (``model``) and of its ``prompts``."""
    directory = (
        model.directory if isinstance(model, Pretrained) else make_checkpoint(model, plan, lengths, place / "model")
    )
    generator = np.random.default_rng(0)
    if isinstance(model, Pretrained):
        sums = generator.integers(10, 100, (plan.data_prompts, 2)).tolist()
        questions = [f"What is {a} + {b}? Give the number only." for a, b in sums]
    else:
        words = generator.integers(FIRST_WORD, model.vocabulary, (plan.data_prompts, plan.prompt_tokens)).tolist()
        questions = [" ".join(f"w{i}" for i in row) for row in words]
    rows = [{"question": question, "answer": "0"} for question in questions]
    write_atomic(place / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(directory), "prompts": str(place / "prompts.jsonl")}


def make_checkpoint(model: Model, plan: Plan, lengths: Lengths, directory: Path) -> Path:
    """A Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=model.vocabulary,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.key_value_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).float()
    bias_end_of_sequence(made, 1 / _mean_length(plan) if lengths == "variable" else None)
    made.save_pretrained(directory)
    _tokenizer(model.vocabulary).save_pretrained(directory)
    return directory


def _mean_length(plan: Plan) -> float:
    """Mean length of completions without a limit, so that the limit is four times the mean."""
    return plan.new_tokens / 4


def bias_end_of_sequence(model: Any, probability: float | None) -> None:
    """Give the end of sequence this probability at every position; None: it is never sampled.

    Args:
        model: a Qwen2 of transformers with an output layer of its own; changed in place.
    """
    import torch

    with torch.no_grad():
        spread = model.model.embed_tokens.weight.std().item()
        model.model.embed_tokens.weight[:, CONSTANT] = 2 * spread * model.config.hidden_size**0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[CONSTANT] = 0
            layer.mlp.down_proj.weight[CONSTANT] = 0
        head = model.lm_head.weight
        head[:, CONSTANT] = 0
        head[EOS] = 0
        ids = torch.randint(FIRST_WORD, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
        hidden = model.model(ids).last_hidden_state
        others = model.lm_head(hidden)
        others[..., EOS] = -torch.inf
        others = others.logsumexp(-1).mean().item()
        bias = NEVER if probability is None else others + float(np.log(probability / (1 - probability)))
        head[EOS, CONSTANT] = bias / hidden[..., CONSTANT].mean()


def _tokenizer(vocabulary: int) -> Any:
    """A tokenizer with a word for each token id, so that every sampled token can be decoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(FIRST_WORD, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
