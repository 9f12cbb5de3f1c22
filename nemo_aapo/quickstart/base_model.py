"""A tiny Qwen2 model made in about a minute: supervised on sums, first on right answers, then on partly wrong ones."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_aapo.files import write_atomic
from nemo_aapo.quickstart import arithmetic
from nemo_aapo.quickstart.arithmetic import Sum

STAMP = "base_model.json"
"""Settings and figures; its presence says that the directory is whole."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the model, bit for bit on one machine."""

    seed: int = 0
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 256
    initializer_range: float = 0.07
    """Larger than usual: tiny models learn to carry in a third of the steps."""
    clean_steps: int = 400
    """Steps on right answers, so that it can add; the rest teaches it to slip."""
    noisy_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-3


class BaseModelError(RuntimeError):
    """The directory holds something else; the message says what to do."""


def make_base_model(directory: Path, recipe: Recipe, *, force: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the model, its tokenizer and its data, or find them made already.

    Args:
        directory: ends up with config.json, model.safetensors, tokenizer files, data/*.jsonl and the stamp, all at
            once: it is built beside and renamed.
        force: replace what is there.
        say: told of progress, a line at a time.

    Returns:
        The stamp's content: recipe, parameters, accuracies, seconds.

    Raises:
        BaseModelError: the directory holds another recipe's model or something else, and ``force`` is false.
    """
    found = _find(directory, recipe)
    if found is not None and not force:
        say(f"base model: {directory} is there already ({_figures(found)})")
        return found
    if directory.exists() and not force:
        raise BaseModelError(
            f"{directory} exists but is not the base model of these settings: --force replaces it, --out names another"
        )
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    sums = arithmetic.split_sums(recipe.seed)
    tokenizer = arithmetic.make_tokenizer()
    model = _train(recipe, sums.supervised, tokenizer, say)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    arithmetic.write_prompts(partial / "data" / "train.jsonl", sums.training)
    arithmetic.write_prompts(partial / "data" / "validation.jsonl", sums.validation)
    stamp = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "accuracy_greedy": accuracy(model, tokenizer, sums.validation, samples=1, temperature=0.0),
        "accuracy_sampled": accuracy(model, tokenizer, sums.validation, samples=8, temperature=1.0),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomic(partial / STAMP, json.dumps(stamp, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    say(f"base model: made {directory} ({_figures(stamp)})")
    return stamp


def _find(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    try:
        stamp = json.loads((directory / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return stamp if stamp.get("recipe") == asdict(recipe) else None


def _figures(stamp: dict[str, Any]) -> str:
    return (
        f"{stamp['parameters']:,} parameters, {stamp['seconds']:.0f} s, accuracy on held-out prompts "
        f"{stamp['accuracy_greedy']:.3f} greedy, {stamp['accuracy_sampled']:.3f} sampled"
    )


def _train(recipe: Recipe, sums: Sequence[Sum], tokenizer: Any, say: Callable[[str], None]) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    generator = random.Random(recipe.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=recipe.initializer_range,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    steps = recipe.clean_steps + recipe.noisy_steps
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        pairs = generator.choices(sums, k=recipe.batch_size)
        clean = step < recipe.clean_steps
        answers = [arithmetic.answer(p) if clean else arithmetic.noisy_answer(p, generator) for p in pairs]
        loss = _loss(model, tokenizer, pairs, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            what = "right answers" if clean else "partly wrong answers"
            say(f"base model: step {step + 1}/{steps} on {what}, loss {loss.item():.3f}")
    return model.eval()


def _loss(model: Any, tokenizer: Any, pairs: Sequence[Sum], answers: Sequence[str]) -> Any:
    """Mean cross-entropy of the answers and the end-of-sequence token; prompts all have the same length."""
    import torch

    prompts = _prompt_ids(tokenizer, pairs)
    targets = [[*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in answers]
    longest = max(map(len, targets))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in targets])
    inputs = torch.cat([prompts, labels.clamp(min=0)], dim=1)[:, :-1]
    logits = model(input_ids=inputs).logits[:, prompts.shape[1] - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _prompt_ids(tokenizer: Any, pairs: Sequence[Sum]) -> Any:
    """int64 [n, P], rendered by the chat template as training will render them."""
    import torch

    chats = [[{"role": "user", "content": arithmetic.question(pair)}] for pair in pairs]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def accuracy(model: Any, tokenizer: Any, pairs: Sequence[Sum], *, samples: int, temperature: float) -> float:
    """Share of right answers by transformers' own ``generate``; temperature 0 is greedy."""
    import torch

    torch.manual_seed(0)
    prompts = _prompt_ids(tokenizer, pairs).repeat_interleave(samples, dim=0)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with torch.no_grad():
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, **({"do_sample": False} | how)
        )
    texts = tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    truths = [arithmetic.answer(pair) for pair in pairs for _ in range(samples)]
    return sum(text == truth for text, truth in zip(texts, truths, strict=True)) / len(texts)
