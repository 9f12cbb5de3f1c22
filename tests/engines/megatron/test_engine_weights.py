"""The Megatron engine reads the learner's own weights, leaves them as they are, and sees every change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.engines.megatron.generation import ROOMY, SEEDS, SPEC, VOCAB_SIZE, build, flat, prompts

pytestmark = pytest.mark.exact


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


def _rollouts_around_a_change(path, tp, onednn):
    """Long enough for copies: before and after the weights changed in place, with and without."""
    import weakref

    import torch

    from nemo_aapo.engines.megatron import batch, decoder, matmul
    from nemo_aapo.engines.megatron import engine as megatron_engine

    model, copies, results = build(path, tp), [], []
    long, engine = (
        dataclasses.replace(SPEC, max_new_tokens=40),
        megatron_engine.MegatronEngine(model, VOCAB_SIZE, ROOMY),
    )

    def watched(weight):
        copy = matmul.pack_weight(weight)
        if copy is not weight:
            copies.append(weakref.ref(copy))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "SMALL_WEIGHT", 1 << 12)  # of which a tiny model has large ones
        patch.setattr(matmul, "MAX_BLOCK_COLUMNS", 64)
        patch.setattr(matmul, "packs_by_onednn", lambda: onednn)
        patch.setattr(decoder, "pack_weight", watched)
        pays = batch.packing_pays
        for _ in range(2):
            for rule in (pays, lambda *_: False):
                patch.setattr(batch, "packing_pays", rule)
                made = len(copies)
                results.append(engine.generate(prompts(), long, SEEDS))
                assert (len(copies) > made) == (rule is pays)
                assert not any(copy() is not None for copy in copies)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.25)
    return results


@pytest.mark.parametrize(("tp", "onednn"), [(1, False), (1, True), (2, True)])
def test_copies_of_weights_are_as_new_as_the_weights_and_do_not_outlive_the_rollout(ranks, tiny_models, tp, onednn):
    for results in ranks.run(_rollouts_around_a_change, tiny_models["qwen2"], tp, onednn, world=tp, tp=tp):
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
