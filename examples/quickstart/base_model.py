"""Tiny models made in about a minute: supervised on a task, first on right answers, then on partly wrong ones."""

from __future__ import annotations

import functools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import arithmetic
from nemo_aapo.utils.files import whole_directory, write_atomic

STAMP = "base_model.json"
"""File with settings and figures; a directory that has it is complete."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its right answer."""

    question: str
    answer: str
    noisy_answer: Callable[[random.Random], str]
    """Mostly wrong, as the base model is to answer."""
    gold: str | None = None
    """What the data has as its answer, where that is another text."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task in three parts without overlap; all questions have the same number of tokens."""

    supervised: Sequence[Item]
    """What the base model is trained on."""
    training: Sequence[Item]
    """Prompts of reinforcement learning."""
    validation: Sequence[Item]
    """Held-out prompts."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings that decide a Qwen2 model, to the bit on one machine."""

    seed: int = 0
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 256
    initializer_range: float = 0.07
    """Larger than usual: tiny models learn to carry in a third of the steps."""
    clean_steps: int = 1500
    """Most steps on right answers, which end at ``clean_loss``."""
    clean_loss: float = 0.05
    """Mean loss at which the model can add. It gets there after 355 to 780 steps (four seeds). From a model that can't
    add, reinforcement reaches only 0.60 instead of 0.95 of the held-out sums."""
    noisy_steps: int = 200
    """Steps on partly wrong answers, which teach it to slip."""
    batch_size: int = 64
    learning_rate: float = 2e-3

    def lesson(self) -> Lesson:
        """What the model is taught: sums with slips."""
        return sums_with_slips(self.seed)


@dataclass(frozen=True, slots=True)
class MixtureRecipe(Recipe):
    """The settings of a Qwen3 mixture of experts; a token passes as many units as in the dense model."""

    intermediate_size: int = 128
    """Units of one expert."""
    experts: int = 8
    experts_per_token: int = 2


def sums_with_slips(
    seed: int, true_share: float = arithmetic.TRUE_SHARE, slip_share: float = arithmetic.SLIP_SHARE
) -> Lesson:
    """Sums of two-digit numbers; the noisy answers are right and have the slip in these fractions."""

    def item(pair: arithmetic.Sum) -> Item:
        noisy = functools.partial(arithmetic.noisy_answer, pair, true_share=true_share, slip_share=slip_share)
        return Item(arithmetic.question(pair), arithmetic.answer(pair), noisy)

    sums = arithmetic.split_sums(seed)
    return Lesson(*([item(pair) for pair in part] for part in (sums.supervised, sums.training, sums.validation)))


class BaseModelError(RuntimeError):
    """The directory holds something else; the message says what to do."""


def make_base_model(directory: Path, recipe: Recipe, *, force: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """Make the model, its tokenizer and its data, or find them made already.

    Args:
        directory: ends up with config.json, model.safetensors, tokenizer files, data/*.jsonl and the stamp, all at
            once: it is built beside and renamed.
        force: replace what is there.
        log: called with lines about the progress.

    Returns:
        The stamp's content: recipe, parameters, accuracies, seconds.

    Raises:
        BaseModelError: the directory holds another recipe's model and ``force`` is false, or it holds something that
            is no base model, which is never removed.
    """
    found = _find(directory, recipe)
    if found is not None and not force:
        log(f"base model: {directory} is there already ({_figures(found)})")
        return found
    _require_replaceable(directory, force)
    with whole_directory(directory) as partial:
        started = time.monotonic()
        lesson = recipe.lesson()
        tokenizer = arithmetic.make_tokenizer()
        model = _train(recipe, lesson.supervised, tokenizer, log)
        stamp = {
            "recipe": asdict(recipe),
            "parameters": model.num_parameters(),
            "accuracy_greedy": accuracy(model, tokenizer, lesson.validation, samples=1, temperature=0.0),
            "accuracy_sampled": accuracy(model, tokenizer, lesson.validation, samples=8, temperature=1.0),
            "seconds": round(time.monotonic() - started, 1),
        }
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, items in (("train", lesson.training), ("validation", lesson.validation)):
            rows = [json.dumps({"question": item.question, "answer": item.gold or item.answer}) for item in items]
            write_atomic(partial / "data" / f"{name}.jsonl", "\n".join(rows) + "\n")
        (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    log(f"base model: made {directory} ({_figures(stamp)})")
    return stamp


def _require_replaceable(directory: Path, force: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / STAMP).is_file():
        raise BaseModelError(
            f"{directory} exists but holds no base model (no {STAMP}): --out names another place, "
            "or remove it yourself; --force does not"
        )
    if not force:
        raise BaseModelError(
            f"{directory} holds the base model of other settings: --force replaces it, --out names another place"
        )


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


def new_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's transformers model with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(recipe.seed)
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": recipe.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if isinstance(recipe, MixtureRecipe):
        experts = {
            "head_dim": recipe.hidden_size // recipe.heads,
            "moe_intermediate_size": recipe.intermediate_size,
            "num_experts": recipe.experts,
            "num_experts_per_tok": recipe.experts_per_token,
            "norm_topk_prob": True,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **experts)).float()
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shared)).float()
    # by default transformers samples from the 50 likeliest tokens
    model.generation_config.update(do_sample=True, top_k=0, max_new_tokens=8)
    return model


def _train(recipe: Recipe, items: Sequence[Item], tokenizer: Any, log: Callable[[str], None]) -> Any:
    import torch

    generator = random.Random(recipe.seed)
    model = new_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    prompts = _prompt_ids(tokenizer, items)

    def take_step(answer_of: Callable[[Item], str], rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        batch = generator.choices(range(len(items)), k=recipe.batch_size)
        loss = _loss(model, tokenizer, prompts[batch], [answer_of(items[i]) for i in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    mean_loss = math.inf
    for step in range(1, recipe.clean_steps + 1):
        loss = take_step(lambda item: item.answer, rate=min(1.0, step / 30))
        mean_loss = loss if step == 1 else 0.95 * mean_loss + 0.05 * loss
        able = mean_loss <= recipe.clean_loss
        if step % 100 == 0 or able or step == recipe.clean_steps:
            log(f"base model: step {step} on right answers, loss {mean_loss:.3f} (until {recipe.clean_loss})")
        if able:
            break
    for step in range(1, recipe.noisy_steps + 1):
        rate = 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.noisy_steps))
        loss = take_step(lambda item: item.noisy_answer(generator), rate)
        if step % 100 == 0:
            log(f"base model: step {step}/{recipe.noisy_steps} on partly wrong answers, loss {loss:.3f}")
    return model.eval()


def _loss(model: Any, tokenizer: Any, prompts: Any, answers: Sequence[str]) -> Any:
    """Mean cross-entropy of the answers and the end-of-sequence token, for prompts int64 [n, P]."""
    import torch

    texts = [text + tokenizer.eos_token for text in answers]
    targets = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, targets))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in targets])
    inputs = torch.cat([prompts, labels.clamp(min=0)], dim=1)[:, :-1]
    logits = model(input_ids=inputs).logits[:, prompts.shape[1] - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _prompt_ids(tokenizer: Any, items: Sequence[Item]) -> Any:
    """int64 [n, P], rendered by the chat template as training will render them."""
    import torch

    chats = [[{"role": "user", "content": item.question}] for item in items]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def accuracy(model: Any, tokenizer: Any, items: Sequence[Item], *, samples: int, temperature: float) -> float:
    """Fraction of right answers by transformers' own ``generate``; temperature 0 is greedy."""
    import torch

    torch.manual_seed(0)
    prompts = _prompt_ids(tokenizer, items).repeat_interleave(samples, dim=0)
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0}
    how = sampled if temperature else {"do_sample": False, "top_k": None}
    with torch.no_grad():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=max(len(item.answer) for item in items) + 2,
            **how,
        )
    texts = tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    truths = [item.answer for item in items for _ in range(samples)]
    return sum(text == truth for text, truth in zip(texts, truths, strict=True)) / len(texts)
