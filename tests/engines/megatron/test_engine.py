"""The Megatron engine draws what a plain forward pass says, the same on every layout and in every batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.types import SamplingSpec
from tests.tiny_models import make_config

pytestmark = pytest.mark.exact

VOCAB_SIZE = 150  # of the model's 160: the rest plays Megatron's padding
SPEC = SamplingSpec(temperature=0.8, max_new_tokens=24, stop_token_ids=(3, 7, 20, 41, 90, 111), min_new_tokens=2)
GREEDY = dataclasses.replace(SPEC, temperature=0.0)
TIGHT, ROOMY = 5 * 43, 100 * 43  # 43 tokens a row at most: 5 rows for 25 sequences, and a row for each
LAYOUTS = {"2x1": (2, 1, False), "1x2": (1, 2, False), "2x2": (2, 2, False), "2x1+sp": (2, 1, True)}


def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, VOCAB_SIZE, n).astype(np.int32) for n in (3, 19, 1, 8, 8, 13)]


SEEDS = [[1000 * i + j for j in range(size)] for i, size in enumerate((6, 4, 7, 1, 0, 7))]


def build(path: Path, tp: int = 1, pp: int = 1, sp: bool = False):
    """This rank's stage, with the weights of a Hugging Face directory."""
    import torch
    from megatron.core import parallel_state

    from nemo_aapo.mcore import precision
    from nemo_aapo.mcore.weights import WeightMap

    weights = WeightMap(str(path), torch.float32)
    provider = weights.provider()
    for name, value in {
        **precision.model_fields(precision.decide(make_config(path))),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": sp,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }.items():
        setattr(provider, name, value)
    provider.finalize()
    model = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage()
    )
    weights.load(model)
    return model


def generate(path, calls, tp=1, pp=1, sp=False):
    """On each rank: for each call (prompts, seeds, spec, budget) the completions, the order they came in, the stats."""
    from nemo_aapo.engines.base import RolloutEngine
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model, results = build(path, tp, pp, sp), []
    for texts, seeds, spec, budget in calls:
        engine = MegatronEngine(model, VOCAB_SIZE, budget, policy_version=4)
        assert isinstance(engine, RolloutEngine)
        told: list[tuple] = []
        out = engine.generate(texts, spec, seeds, lambda *news, told=told: told.append(news))
        assert all(out[i][j] is completion for i, j, completion in told)
        order = [(i, j) for i, j, _ in told]
        assert sorted(order) == [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        results.append((out, order, engine.stats))
    return results


def one_rank(ranks, path, *calls):
    return ranks.run(generate, path, calls)[0]


def flat(completions) -> list[list[int]]:
    return [completion.token_ids.tolist() for row in completions for completion in row]


def plain_logprobs(model, prompt: np.ndarray, completion: np.ndarray, spec: SamplingSpec) -> np.ndarray:
    """Log-probs [T, V] before each token of a completion: no cache, no padding, no batch."""
    import torch

    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE] / (spec.temperature or 1.0)
    logits[: spec.min_new_tokens, list(spec.stop_token_ids)] = -torch.inf
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
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
    """A completion as it would be with stop strings: the tokens, and whether one was found."""
    for n in range(at_least, len(tokens) + 1):
        if any(string in text(tokens[:n]) for string in STRINGS):
            return tokens[:n], True
    return tokens, False


def _generate_with_strings(path, tp, pp):
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path, tp, pp), VOCAB_SIZE, TIGHT, decode=text)
    spec = dataclasses.replace(SPEC, min_new_tokens=0)
    whole = engine.generate(prompts(), spec, SEEDS)
    ended = engine.generate(prompts(), dataclasses.replace(spec, stop_strings=STRINGS), SEEDS)
    return whole, ended


@pytest.mark.parametrize("layout", ["1x1", "2x2"])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(ranks, tiny_models, layout):
    tp, pp, _ = {"1x1": (1, 1, False), **LAYOUTS}[layout]
    arguments = (tiny_models["qwen2_tied"], tp, pp)
    answers = ranks.run(_generate_with_strings, *arguments, world=tp * pp, tp=tp, pp=pp)
    for whole, ended in answers:
        completions = [completion for row in ended for completion in row]
        expected = [cut(tokens, 1) for tokens in flat(whole)]
        assert flat(ended) == [tokens for tokens, _ in expected]
        assert sum(found for _, found in expected) > 5
        for completion, (_, found) in zip(completions, expected, strict=True):
            assert not found or completion.finish_reason == "stop"
            assert len(completion.logprobs) == len(completion.token_ids)
    assert all(flat(ended) == flat(answers[0][1]) for _, ended in answers)


CALLS = [(prompts(), SEEDS, spec, TIGHT) for spec in (SPEC, GREEDY)]


@pytest.fixture(scope="module")
def drawn_on_one_rank(ranks, tiny_models):
    return one_rank(ranks, tiny_models["qwen2_tied"], *CALLS)


@pytest.mark.parametrize("layout", list(LAYOUTS))
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


def _gradient_around_generate(path, tp, sp):
    """Gradients of one training pass before and after a rollout, and what else the rollout might leave behind."""
    import torch

    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model = build(path, tp, sp=sp)
    tokens = torch.arange(2, 34).view(2, 16)

    def traces():
        model.zero_grad()
        model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens.roll(-1, 1)).mean().backward()
        switches = [
            (name, key, value)
            for name, module in model.named_modules()
            for holder in (module, getattr(module, "config", None))
            for key, value in vars(holder or module).items()
            if isinstance(value, bool) or key == "forward"
        ]
        return [parameter.grad.numpy().copy() for parameter in model.parameters()], switches, model.decoder.input_tensor

    before = traces()
    MegatronEngine(model, VOCAB_SIZE, ROOMY).generate(prompts(), SPEC, SEEDS)
    after = traces()
    return before, after


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_the_learner_finds_its_model_as_it_left_it(ranks, tiny_models, tp, sp):
    for before, after in ranks.run(_gradient_around_generate, tiny_models["qwen3"], tp, sp, world=tp, tp=tp):
        assert before[1:] == after[1:]
        assert any(key == "sequence_parallel" and value for _, key, value in before[1]) == sp
        assert all(np.array_equal(a, b) and np.abs(a).max() > 0 for a, b in zip(before[0], after[0], strict=True))


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
    model.config.window_size = (8, 0)
    with pytest.raises(ValueError, match="window_size"):
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


def _generate_with_fused_norms(path):
    """TransformerEngine's projections hold the norm before them; mcore's local ones made to look like that."""
    import torch

    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model = build(path)
    expected = flat(MegatronEngine(model, VOCAB_SIZE, ROOMY).generate(prompts(), SPEC, SEEDS))
    for layer in model.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            linear.layer_norm_weight = torch.nn.Parameter(norm.weight.detach().clone())
            norm.weight.data.zero_()
    return expected, flat(MegatronEngine(model, VOCAB_SIZE, ROOMY).generate(prompts(), SPEC, SEEDS))


def test_norms_are_found_where_transformer_engine_keeps_them(ranks, tiny_models):
    ((expected, found),) = ranks.run(_generate_with_fused_norms, tiny_models["qwen3"])
    assert found == expected


def _rollouts_around_a_change(path, tp):
    """Long enough for copies: before and after the weights changed in place, with and without; what copies were."""
    import weakref

    import torch

    from nemo_aapo.engines.megatron import decoder
    from nemo_aapo.engines.megatron import engine as megatron_engine
    from nemo_aapo.engines.megatron import matmul as products

    model, copies, shapes, results = build(path, tp), [], [], []
    long, engine = (
        dataclasses.replace(SPEC, max_new_tokens=40),
        megatron_engine.MegatronEngine(model, VOCAB_SIZE, ROOMY),
    )

    def watched(weight):
        copy = products.arranged(weight)
        shapes.append(copy.dim())
        if copy is not weight:
            copies.append(weakref.ref(copy))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SMALL_WEIGHT", 1 << 12)  # of which a tiny model has large ones
        patch.setattr(products, "WIDEST_PANEL", 64)
        patch.setattr(decoder, "arranged", watched)
        pays = megatron_engine._copy_pays
        for _ in range(2):
            for rule in (pays, lambda *_: False):
                patch.setattr(megatron_engine, "_copy_pays", rule)
                made = len(copies)
                results.append(engine.generate(prompts(), long, SEEDS))
                assert (len(copies) > made) == (rule is pays)
                assert not any(copy() is not None for copy in copies)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.25)
    return results, set(shapes)


@pytest.mark.parametrize("tp", [1, 2])
def test_copies_of_weights_are_as_new_as_the_weights_and_do_not_outlive_the_rollout(ranks, tiny_models, tp):
    for results, shapes in ranks.run(_rollouts_around_a_change, tiny_models["qwen2"], tp, world=tp, tp=tp):
        assert 3 in shapes
        before, plain_before, after, plain_after = results
        assert flat(before) != flat(after)
        for ours, plain in ((before, plain_before), (after, plain_after)):
            assert flat(ours) == flat(plain)
            for row, expected in zip(ours, plain, strict=True):
                for a, b in zip(row, expected, strict=True):
                    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def _versions(path):
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path), VOCAB_SIZE, ROOMY)

    def unread():
        raise AssertionError("the engine has no use for weights")
        yield

    before = engine.generate(prompts()[:1], SPEC, [[1]])[0][0].policy_version
    engine.update_weights(unread(), version=7)
    engine.sleep()
    engine.wake()
    return before, engine.generate(prompts()[:1], SPEC, [[1]])[0][0].policy_version


def test_a_refit_is_a_new_version_of_the_same_weights(ranks, tiny_models):
    assert ranks.run(_versions, tiny_models["qwen2"]) == [(0, 7)]
