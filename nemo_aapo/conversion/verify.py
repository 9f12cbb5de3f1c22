"""Whether a Megatron model and a Hugging Face directory are the same model: every tensor's bytes, and the logits.

Both sides compute in float32, into which bfloat16 and float16 go without loss: what differs is then a mistake of the
conversion, and not rounding. Collective.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemo_aapo.conversion import megatron_model
from nemo_aapo.conversion.source import ModelSource, lora_of
from nemo_aapo.data.tokenizer import load_tokenizer, render_prompts
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.distributed.device import device
from nemo_aapo.errors import ConfigError
from nemo_aapo.mcore import passes
from nemo_aapo.mcore.groups import gather_columns
from nemo_aapo.mcore.micro_batch import MicroBatch
from nemo_aapo.mcore.model import GPTModel, output_weight
from nemo_aapo.models.directory import read_config_json, read_model_dir, shape_of
from nemo_aapo.models.families import require_convertible
from nemo_aapo.models.weights import own_tensors
from nemo_aapo.text.transformers5 import translated_config
from nemo_aapo.utils.safetensors import tensor_headers, weight_files

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May?",
    "What is the smallest positive integer that is divisible by both 12 and 18?",
    "Let $f(x) = x^2 - 4x + 7$. Find the minimum value of $f$.",
    "Was ist 17 mal 23? Rechne Schritt für Schritt.",
)
"""The prompts that are compared where no file is named."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was compared, and what came of it.

    Example: ``Verdict(tensors=290, different=(), prompts=4, tokens=131, max_logit_difference=3e-5,
    max_logprob_difference=2e-5, same_choice=1.0)``
    """

    tensors: int
    """Number of tensors whose bytes were compared."""
    different: tuple[str, ...]
    """Names of tensors whose bytes differ, or that only one side has."""
    prompts: int
    """Number of prompts whose logits were compared."""
    tokens: int
    """Number of tokens in all prompts."""
    max_logit_difference: float
    """The largest difference of a logit, over all positions and tokens of the vocabulary."""
    max_logprob_difference: float
    """The largest difference of a log-prob, in nats."""
    same_choice: float
    """Fraction of the positions at which both have the same most likely token."""

    def ok(self, tolerance: float) -> bool:
        """True if all bytes are equal, and the log-probs differ by ``tolerance`` nats at the most."""
        return not self.different and self.max_logprob_difference <= tolerance


def verify(
    source: ModelSource, directory: Path, questions: Sequence[str] = PROMPTS, log: Callable[[str], None] = print
) -> Verdict | None:
    """Compare both sides. Collective.

    Args:
        source: the Megatron side: a checkpoint, a run, a converted model; or the Hugging Face directory itself, which
            is then converted in memory.
        directory: the Hugging Face side.
        questions: rendered by the tokenizer's chat template, if it has one.
        log: told on rank 0 what is done.

    Returns:
        The verdict, on rank 0; None on the others.

    Raises:
        ConfigError, DataError: a model or tokenizer that can't be read.
        CheckpointError: no whole checkpoint.
    """
    agree(lambda: _check(source, directory))
    weight_map, module = megatron_model.build(source.base, torch.float32, lora_of(source))
    if source.kind == "hf":
        weight_map.load(module)
    else:
        megatron_model.load_checkpoint(source, module, log)
    different, tensors = _compare_bytes(weight_map.export(module), directory)
    _, prompts = render_prompts(load_tokenizer(str(directory)), questions)
    logits = [part for ids in prompts if (part := _logits(module, ids)) is not None]
    if parallel.rank() != 0:
        return None
    distances = _distances(directory, prompts, logits)
    return Verdict(tensors, tuple(different), len(prompts), sum(map(len, prompts)), *distances)


def report(verdict: Verdict, tolerance: float, shown: int = 5) -> list[str]:
    """The verdict as lines for people."""
    count = len(verdict.different)
    names = ", ".join(verdict.different[:shown]) + (f" and {count - shown} more" if count > shown else "")
    return [
        f"tensors        {verdict.tensors}, " + (f"{count} DIFFERENT: {names}" if count else "equal to the bit"),
        f"prompts        {verdict.prompts}, {verdict.tokens} tokens",
        f"logits         largest difference {verdict.max_logit_difference:.2e}",
        f"log-probs      largest difference {verdict.max_logprob_difference:.2e}, allowed {tolerance:.0e}",
        f"choices        {verdict.same_choice:.1%} of the positions have the same most likely token",
        "verified" if verdict.ok(tolerance) else "DIFFERENT",
    ]


def _check(source: ModelSource, directory: Path) -> None:
    require_convertible(source.base)
    require_convertible(directory)
    read_model_dir(str(directory))


def _compare_bytes(exported: Iterable[tuple[str, torch.Tensor]], directory: Path) -> tuple[list[str], int]:
    """The names of tensors that differ, and how many there are; on rank 0. Each is compared in its file's dtype."""
    from safetensors import safe_open

    if parallel.rank() != 0:
        for _ in exported:
            pass
        return [], 0
    headers = own_tensors(tensor_headers(directory), shape_of(read_config_json(directory)))
    files = {name: safe_open(directory / name, framework="pt") for name in weight_files(directory)}
    different, left = [], set(headers)
    for name, tensor in exported:
        left.discard(name)
        stored = files[headers[name].file].get_tensor(name) if name in headers else None
        if stored is None or not _same_bytes(tensor.to("cpu", stored.dtype), stored):
            different.append(name)
    return [*different, *sorted(left)], len(headers)


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    left, right = (tensor.contiguous().view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


@torch.no_grad()
def _logits(module: GPTModel, ids: np.ndarray) -> torch.Tensor | None:
    """Logits [P, vocabulary] of one prompt, on rank 0: hidden states as the learner takes them, times its weight."""
    tokens = torch.as_tensor(ids, dtype=torch.int64, device=device())

    def of_hidden(hidden: torch.Tensor, _: MicroBatch) -> torch.Tensor:
        return gather_columns(torch.nn.functional.linear(hidden[:, 0], output_weight(module))).cpu()

    outputs = passes.forward(module, [MicroBatch.of_one_sequence(tokens)], of_hidden)
    outputs = parallel.broadcast_from_last_stage(outputs)
    return outputs[0] if parallel.rank() == 0 else None


@torch.no_grad()
def _distances(
    directory: Path, prompts: Sequence[np.ndarray], logits: Sequence[torch.Tensor]
) -> tuple[float, float, float]:
    """The largest difference of logits and of log-probs to transformers', and the fraction of equal choices."""
    from transformers import AutoModelForCausalLM

    config = translated_config(directory, read_config_json(directory))
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()
    raw, logprob, same = [], [], []
    for ids, ours in zip(prompts, logits, strict=True):
        theirs = model(torch.as_tensor(ids, dtype=torch.int64)[None]).logits[0]
        ours = ours[:, : theirs.shape[1]]
        raw.append((ours - theirs).abs().max())
        logprob.append((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    largest = [float(torch.stack(found).max()) for found in (raw, logprob)]  # NaN is the largest, as it is not of max()
    return largest[0], largest[1], float(torch.cat(same).mean())


def read_questions(path: Path, field: str, count: int) -> list[str]:
    """The first questions of a JSONL file.

    Raises:
        ConfigError: no such file, or a line without the field.
    """
    questions = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in itertools.islice(file, count):
                questions.append(str(json.loads(line)[field]))
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        where = f"--prompts {path}, line {len(questions) + 1}"
        raise ConfigError(f"{where}: no JSON object with the field {field!r} ({error})") from None
    if not questions:
        raise ConfigError(f"--prompts {path}: empty")
    return questions
