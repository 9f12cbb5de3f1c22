"""The in-process engine beside transformers' ``generate``: the same weights, prompts, lengths and rows at a time.

Both sample from the whole softmax at temperature 1, on one thread. Fixed lengths: nothing ends a completion before the
limit. Variable lengths: the engine samples with many stop tokens, which a random model generates often; transformers is
told to end each row at the engine's length. Either way both compute the same numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Figure, in_turns, ratio
from nemo_aapo.types import Completion, SamplingSpec
from nemo_aapo.utils import tables

VOCABULARY = 1024
GROUP = 8
MAX_LOGPROB_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the comparison."""

    hidden_sizes: tuple[int, ...] = (128, 256)
    layers: int = 4
    rows: int = 64
    """Sequences that run at a time, in both."""
    prompt_tokens: int = 32
    new_tokens: int = 64
    """The limit; fixed lengths are this long. Variable ones are a quarter of it on average."""
    waves: int = 3
    """With variable lengths, ``waves * rows`` sequences are generated: transformers takes them batch by batch."""
    repeats: int = 5


QUICK = Plan(hidden_sizes=(64,), layers=2, rows=16, prompt_tokens=8, new_tokens=16, waves=2, repeats=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: completion tokens per second of the clock, and ratios of engine to ``generate``."""

    model: str
    prompts: str
    lengths: str
    tokens: int
    tail_factor: float
    """Longest completion over the mean."""
    engine: Figure
    generate: Figure
    ratio: Figure
    ratio_cpu: Figure


def compare(plan: Plan, folder: Path) -> list[Row]:
    """Compare every combination of model size, shared or own prompts, fixed or variable lengths.

    Args:
        folder: gets the models' files.

    Raises:
        AssertionError: the two disagree on log-probs, so that their speeds can't be compared.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.models.directory import read_model_dir

    logging.set_verbosity_error()  # otherwise it warns for each model that it isn't sharded over ranks
    rows = []
    for hidden_size in plan.hidden_sizes:
        path = random_model(plan, hidden_size, folder / f"d{hidden_size}")
        transformers_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        policy = MegatronPolicy(decide(config_of(path), Machine.present()), read_model_dir(str(path)))
        budget = plan.rows * (plan.prompt_tokens + plan.new_tokens)
        engine = MegatronEngine(policy.module, VOCABULARY, budget)
        for shared in (True, False):
            for variable in (False, True):
                rows.append(_compare(plan, f"d={hidden_size}", engine, transformers_model, shared, variable))
    return rows


def _compare(plan: Plan, model: str, engine: Any, transformers_model: Any, shared: bool, variable: bool) -> Row:
    sequences, group = plan.rows * (plan.waves if variable else 1), GROUP if shared else 1
    generator = np.random.default_rng(0)
    stops = tuple(range(2, 2 + VOCABULARY * 4 // plan.new_tokens)) if variable else ()
    shape = (sequences // group, plan.prompt_tokens)
    prompts = generator.integers(VOCABULARY // 2, VOCABULARY, shape).astype(np.int32)
    seeds = np.arange(sequences).reshape(-1, group).tolist()
    spec = SamplingSpec(temperature=1.0, max_new_tokens=plan.new_tokens, stop_token_ids=stops)
    completions = engine.generate(list(prompts), spec, seeds)
    _require_same_logprobs(transformers_model, prompts, completions)
    lengths = np.array([len(completion.token_ids) for row in completions for completion in row])
    repeated = np.repeat(prompts, group, axis=0)

    def generate() -> None:
        for first in range(0, sequences, plan.rows):
            batch = slice(first, first + plan.rows)
            _generate(transformers_model, repeated[batch], lengths[batch])

    timings = in_turns(
        {"generate": generate, "engine": lambda: engine.generate(list(prompts), spec, seeds)}, plan.repeats
    )
    tokens = int(lengths.sum())
    return Row(
        model=model,
        prompts=f"groups of {group}" if shared else "each its own",
        lengths="variable" if variable else "fixed",
        tokens=tokens,
        tail_factor=float(lengths.max() / lengths.mean()),
        engine=Figure.of([tokens / timing.wall for timing in timings["engine"]]),
        generate=Figure.of([tokens / timing.wall for timing in timings["generate"]]),
        ratio=ratio(timings["generate"], timings["engine"], "wall"),
        ratio_cpu=ratio(timings["generate"], timings["engine"], "cpu"),
    )


def _generate(model: Any, prompts: np.ndarray, lengths: np.ndarray) -> None:
    """transformers' sampling of ``lengths[i]`` tokens after ``prompts[i]``: int [n, P] and int [n]."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    limits, start = torch.from_numpy(lengths), prompts.shape[1]

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] - start >= limits

    inputs = torch.from_numpy(prompts.astype(np.int64))
    with torch.inference_mode():
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=int(lengths.max()),
            stopping_criteria=StoppingCriteriaList([AtLength()]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert out.shape[1] == start + lengths.max()


def _require_same_logprobs(model: Any, prompts: np.ndarray, completions: Sequence[Sequence[Completion]]) -> None:
    """Require that transformers has the engine's log-probs for the first completion of each prompt."""
    import torch

    for prompt, (completion, *_) in list(zip(prompts, completions, strict=True))[:8]:
        ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        chosen = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        difference = float(np.abs(chosen - completion.logprobs).max())
        assert difference < MAX_LOGPROB_DIFFERENCE, f"engine and transformers differ by {difference:.1e} in log-probs"


def random_model(plan: Plan, hidden_size: int, path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


def config_of(path: Path, *more: str) -> Any:
    """The configuration of a run on one rank. more: settings."""
    from nemo_aapo.config.compose import load_config

    given = [f"model.path={path}", "data.train=unused", "data.validation=unused", "trainer.devices=1"]
    return load_config([*given, *more])


def report(rows: Sequence[Row]) -> str:
    """The table."""
    header = ("model", "prompts", "lengths", "max/mean", "engine tokens/s", "generate tokens/s", "ratio", "by CPU time")
    lines = [
        (
            row.model,
            row.prompts,
            row.lengths,
            f"{row.tail_factor:.1f}",
            row.engine.text(),
            row.generate.text(),
            row.ratio.text(2),
            f"{row.ratio_cpu.median:.2f}",
        )
        for row in rows
    ]
    return tables.plain(header, lines)
