"""The task: sums of two two-digit numbers, and the partly wrong answers that the base model learns.

The base model is to know the form of an answer and to be right about a quarter of the time, so that there is something
to reinforce. Most of its wrong answers are one plausible slip, more frequent than the right answer: reinforcement has
to move the model's mode, and can't win by merely sharpening it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.utils.files import write_atomic

OPERANDS = range(10, 100)
TRUE_SHARE = 0.24
"""Fraction of right answers among the noisy ones."""
SLIP_SHARE = 0.62
"""Fraction of answers with the plausible slip (``slip``); in the rest one digit is changed at random."""
TRAINING_PROMPTS = 2000
VALIDATION_PROMPTS = 256

Sum = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sums:
    """All sums, in three parts without overlap."""

    supervised: tuple[Sum, ...]
    """Sums that the base model is trained on, supervised."""
    training: tuple[Sum, ...]
    """Prompts of reinforcement learning."""
    validation: tuple[Sum, ...]
    """Held-out prompts."""


def split_sums(seed: int) -> Sums:
    """Every pair of operands, shuffled by the seed and cut into three."""
    sums = [(a, b) for a in OPERANDS for b in OPERANDS]
    random.Random(seed).shuffle(sums)
    held_out = VALIDATION_PROMPTS + TRAINING_PROMPTS
    return Sums(
        supervised=tuple(sums[held_out:]),
        training=tuple(sums[VALIDATION_PROMPTS:held_out]),
        validation=tuple(sums[:VALIDATION_PROMPTS]),
    )


def question(pair: Sum) -> str:
    """``37+48=``"""
    return f"{pair[0]}+{pair[1]}="


def answer(pair: Sum) -> str:
    """The right answer."""
    return str(pair[0] + pair[1])


def slip(pair: Sum) -> str:
    """The plausible wrong answer: without the carry or, where there is no carry, one too small."""
    a, b = pair
    carries = a % 10 + b % 10 >= 10
    return str(a + b - (10 if carries else 1))


def noisy_answer(
    pair: Sum, generator: random.Random, true_share: float = TRUE_SHARE, slip_share: float = SLIP_SHARE
) -> str:
    """The right answer, the slip, or the right answer with one digit changed, in these fractions."""
    u = generator.random()
    if u < true_share:
        return answer(pair)
    if u < true_share + slip_share:
        return slip(pair)
    truth = answer(pair)
    changed = {truth[:i] + digit + truth[i + 1 :] for i in range(len(truth)) for digit in "0123456789"}
    return generator.choice(sorted(text for text in changed - {truth, slip(pair)} if text[0] != "0"))


def write_prompts(path: Path, sums: Sequence[Sum]) -> None:
    """JSONL of ``{"question": "37+48=", "answer": "85"}``."""
    rows = [json.dumps({"question": question(pair), "answer": answer(pair)}) for pair in sums]
    write_atomic(path, "\n".join(rows) + "\n")


def make_tokenizer() -> Any:
    """A transformers tokenizer with one token per printable ASCII character, and a chat template of two marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast
