"""The Megatron engine draws what a plain forward pass says, the same on every layout and in every batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nemo_aapo.types import SamplingSpec
from tests.engines.megatron.generation import (
    GREEDY,
    LAYOUTS,
    ROOMY,
    SEEDS,
    SNUG,
    SPEC,
    TIGHT,
    VOCAB_SIZE,
    build,
    flat,
    generate,
    one_rank,
    prompts,
)
from tests.marks import exact_for


def plain_logprobs(model, prompt: np.ndarray, completion: np.ndarray, spec: SamplingSpec) -> np.ndarray:
    """Log-probs [T, V] before each token of a completion: no cache, no padding, no batch."""
    import torch

    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE] / (spec.temperature or 1.0)
    logits[: spec.min_new_tokens, list(spec.stop_token_ids)] = -torch.inf
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.exact
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_logprobs_are_those_of_a_plain_forward_pass(ranks, tiny_models, name):
    """Prompts of mixed lengths, rows refilled, groups that enter in parts, a temperature, early stops masked."""
    from transformers import AutoModelForCausalLM

    path = tiny_models[name]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    (sampled, _, stats), (greedy, _, _) = one_rank(
        ranks, path, (prompts(), SEEDS, SPEC, TIGHT), (prompts(), SEEDS, GREEDY, TIGHT)
    )
    assert stats.steps > 2 * SPEC.max_new_tokens  # that is, rows were refilled
    for prompt, row, best in zip(prompts(), sampled, greedy, strict=True):
        for spec, completion in [(SPEC, completion) for completion in row] + [(GREEDY, c) for c in best[:1]]:
            expected = plain_logprobs(model, prompt, completion.token_ids, spec)
            chosen = np.take_along_axis(expected, completion.token_ids[:, None].astype(int), 1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-5)
            if spec.greedy:
                np.testing.assert_array_equal(completion.token_ids, expected.argmax(-1))


def test_a_completion_ends_with_its_stop_token_or_at_the_limit(ranks, tiny_models):
    ((out, _, stats),) = one_rank(ranks, tiny_models["qwen2"], (prompts(), SEEDS, SPEC, TIGHT))
    completions = [completion for row in out for completion in row]
    assert [len(row) for row in out] == [len(row) for row in SEEDS]
    for completion in completions:
        stops = np.isin(completion.token_ids, SPEC.stop_token_ids)
        assert not stops[:-1].any()
        assert completion.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(completion.token_ids) == SPEC.max_new_tokens
        assert len(completion.token_ids) > SPEC.min_new_tokens
        assert completion.token_ids.max() < VOCAB_SIZE
        assert completion.policy_version == 4
        assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    lengths = [len(completion.token_ids) for completion in completions]
    assert stats.tokens == sum(lengths)
    assert stats.tail_factor == pytest.approx(max(lengths) / np.mean(lengths))
    assert stats.idle_fraction == pytest.approx(1 - sum(lengths) / (5 * stats.steps))


def test_tokens_depend_on_prompt_and_seed_alone(ranks, tiny_models):
    texts = prompts()
    backwards = (texts[::-1], [row[::-1] for row in SEEDS[::-1]])
    alone = [([texts[i]], [[seed]], SPEC, 43) for i, row in enumerate(SEEDS) for seed in row]
    (tight, *_), (roomy, *_), (reverse, *_), (others, *_), *single = one_rank(
        ranks,
        tiny_models["qwen2"],
        (texts, SEEDS, SPEC, TIGHT),
        (texts, SEEDS, SPEC, ROOMY),
        (*backwards, SPEC, 8 * 43),
        (texts, [[seed + 1_000_000 for seed in row] for row in SEEDS], SPEC, ROOMY),
        *alone,
    )
    expected = flat(tight)
    assert len({tuple(tokens) for tokens in expected}) == len(expected)  # each seed its own stream
    assert flat(roomy) == expected
    assert flat(reverse)[::-1] == expected
    assert [flat(out)[0] for out, *_ in single] == expected
    assert all(a != b for a, b in zip(flat(others), expected, strict=True))


def text(token_ids: np.ndarray) -> str:
    """Token n as a letter, so that a random model says a string of one or two of them soon enough."""
    return "".join(chr(ord("a") + token % 26) for token in token_ids)


STRINGS = ("ab", "q", "xyz")


def cut(tokens: list[int], at_least: int) -> tuple[list[int], bool]:
    """A completion as it would be with stop strings: the tokens, and whether one was found, with the last of them."""
    for n in range(at_least, len(tokens) + 1):
        if any(text(tokens[:n]).count(string) > text(tokens[: n - 1]).count(string) for string in STRINGS):
            return tokens[:n], True
    return tokens, False


def _generate_with_strings(path, tp, pp, at_least):
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path, tp, pp), VOCAB_SIZE, SNUG, decode=text)
    spec = dataclasses.replace(SPEC, min_new_tokens=at_least)
    whole = engine.generate(prompts(), spec, SEEDS)
    ended = engine.generate(prompts(), dataclasses.replace(spec, stop_strings=STRINGS), SEEDS)
    return whole, ended


@pytest.mark.parametrize(("layout", "at_least"), [("1x1", 0), ("1x1", 4), ("2x2", 4)])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(ranks, tiny_models, layout, at_least):
    tp, pp, _ = {"1x1": (1, 1, False), **LAYOUTS}[layout]
    arguments = (tiny_models["qwen2_tied"], tp, pp, at_least)
    answers = ranks.run(_generate_with_strings, *arguments, world=tp * pp, tp=tp, pp=pp)
    for whole, ended in answers:
        completions = [completion for row in ended for completion in row]
        expected = [cut(tokens, max(1, at_least)) for tokens in flat(whole)]
        assert flat(ended) == [tokens for tokens, _ in expected]
        assert sum(found for _, found in expected) > 5
        for completion, (_, found) in zip(completions, expected, strict=True):
            assert not found or completion.finish_reason == "stop"
            assert len(completion.logprobs) == len(completion.token_ids)
    assert all(flat(ended) == flat(answers[0][1]) for _, ended in answers)


CALLS = [(prompts(), SEEDS, spec, SNUG) for spec in (SPEC, GREEDY)]


@pytest.fixture(scope="module")
def drawn_on_one_rank(ranks, tiny_models):
    return one_rank(ranks, tiny_models["qwen2_tied"], *CALLS)


@pytest.mark.parametrize("layout", exact_for(LAYOUTS, "2x2"))
def test_every_layout_draws_the_same_tokens_on_every_rank(ranks, tiny_models, drawn_on_one_rank, layout):
    tp, pp, sp = LAYOUTS[layout]
    for results in ranks.run(generate, tiny_models["qwen2_tied"], CALLS, tp, pp, sp, world=tp * pp, tp=tp, pp=pp):
        for (out, order, _), (expected_out, expected_order, _) in zip(results, drawn_on_one_rank, strict=True):
            assert flat(out) == flat(expected_out)
            assert order == expected_order
            for row, expected_row in zip(out, expected_out, strict=True):
                for completion, reference in zip(row, expected_row, strict=True):
                    np.testing.assert_allclose(completion.logprobs, reference.logprobs, atol=1e-5)


def _generate_own_share(path, tp):
    from megatron.core import parallel_state

    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path, tp), VOCAB_SIZE, ROOMY)
    if parallel_state.get_data_parallel_rank() == 0:
        return flat(engine.generate(prompts(), SPEC, SEEDS))
    return flat(engine.generate([], SPEC, []))


def test_data_parallel_ranks_do_not_wait_for_each_other(ranks, tiny_models):
    busy, busy_too, *idle = ranks.run(_generate_own_share, tiny_models["qwen2"], 2, world=4, tp=2)
    assert busy == busy_too
    assert len(busy) == sum(map(len, SEEDS))
    assert idle == [[], []]


def _refusals(path):
    import torch

    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model, messages = build(path), []

    def refused(error, texts, seeds, spec=SPEC, budget=ROOMY):
        with pytest.raises(error) as caught:
            MegatronEngine(model, VOCAB_SIZE, budget).generate(texts, spec, seeds)
        assert model.training  # whatever happened, the learner has its model back
        assert torch.is_grad_enabled()
        messages.append(str(caught.value))

    refused(ValueError, prompts(), SEEDS, budget=42)
    refused(ValueError, [np.zeros(0, np.int32)], [[1]])
    refused(ValueError, prompts(), SEEDS[:-1])
    refused(ValueError, prompts(), SEEDS, dataclasses.replace(SPEC, stop_token_ids=(VOCAB_SIZE,)))
    refused(ValueError, prompts(), SEEDS, dataclasses.replace(SPEC, stop_strings=("a",)))
    model.decoder.final_layernorm.weight.data[0] = torch.nan
    refused(FloatingPointError, prompts(), SEEDS)
    model.config.attention_output_gate = True
    with pytest.raises(ValueError, match="attention_output_gate"):
        MegatronEngine(model, VOCAB_SIZE, ROOMY)
    return messages


def test_what_cannot_work_is_refused_by_name(ranks, tiny_models):
    (messages,) = ranks.run(_refusals, tiny_models["qwen2"])
    budget, empty, seeds, stop, strings, nan = messages
    assert "43 tokens" in budget
    assert "rollout.max_concurrent_tokens=42" in budget
    assert "prompt 0" in empty
    assert "6 prompts but seeds for 5" in seeds
    assert "stop token 150" in stop
    assert "without ``decode``" in strings
    assert "policy version 0" in nan
