"""Weights that change between two decoding steps: each token is sampled, and recorded, by those that it says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engines.megatron.generation import SEEDS, SNUG, SPEC, VOCAB_SIZE, build, prompts
from tests.engines.megatron.test_engine import plain_logprobs

pytestmark = pytest.mark.exact

FACTOR, CHANGES = 0.95, {6: 5, 7: 6, 30: 7}
"""All weights are multiplied by the factor, which makes a new version, before these steps."""
LATE = [[7, 8, 9], [10]]
"""Seeds of prompts that come when the third step has been made."""
MORE = [np.array([5, 6, 11], np.int32), np.array([9], np.int32)]


def _in_flight(path, recompute_kv, tp, pp):
    """The completions by prompt and number, on each rank."""
    return _drawn_in_flight(build(path, tp, pp), recompute_kv)


def _in_flight_with_copies(path, onednn):
    """The same with copies of weights, of which those of two versions are never there at a time."""
    import weakref

    from nemo_aapo.engines.megatron import batch, decoder, matmul

    model, copies = build(path, 1, 1), []

    def watched(weight):
        copy, version = matmul.pack_weight(weight), float(model.decoder.final_layernorm.weight.data[0])
        if copy is not weight:
            assert not any(other() is not None for made_of, other in copies if made_of != version)
            copies.append((version, weakref.ref(copy)))
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "SMALL_WEIGHT", 1 << 12)  # of which a tiny model has large ones
        patch.setattr(matmul, "MAX_BLOCK_COLUMNS", 64)
        patch.setattr(matmul, "packs_by_onednn", lambda: onednn)
        patch.setattr(batch, "packing_pays", lambda *_: True)
        patch.setattr(decoder, "pack_weight", watched)
        found = _drawn_in_flight(model, True)
    assert len({version for version, _ in copies}) == 1 + len(CHANGES)
    return found


def _drawn_in_flight(model, recompute_kv):
    import torch

    from nemo_aapo.engines.base import InFlight
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(model, VOCAB_SIZE, SNUG, policy_version=4)
    steps, found = 0, {}

    def between():
        nonlocal steps
        steps += 1
        if steps in CHANGES:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(FACTOR)
            engine.update_weights((), CHANGES[steps])
        return (MORE, LATE) if steps == 3 else ([], [])

    spec = InFlight(between, recompute_kv, prompt_tokens=19)

    def on_finish(i, j, completion):
        assert (i, j) not in found
        found[i, j] = completion

    engine.generate_in_flight(prompts(), SPEC, SEEDS, on_finish, spec)
    return found


def _models(path):
    """Plain models of each version."""
    import torch
    from transformers import AutoModelForCausalLM

    models = []
    for version in range(4):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(FACTOR**version)
        models.append(model)
    return models


def _distances(path, found):
    """Of each completion, how far each recorded log-prob is from a plain forward pass by the version that it says."""
    models, texts = _models(path), [*prompts(), *MORE]
    distances = {}
    for (i, j), completion in found.items():
        expected = np.stack([plain_logprobs(model, texts[i], completion.token_ids, SPEC) for model in models])
        at = np.arange(len(completion.token_ids))
        chosen = expected[completion.token_versions - 4, at, completion.token_ids]
        distances[i, j] = np.abs(completion.logprobs - chosen)
    return distances


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_with_kv_computed_anew_each_token_has_the_log_prob_of_a_fresh_pass_by_its_version(
    ranks, tiny_models, name, tp, pp
):
    if name != "qwen2" and pp > 1:
        pytest.skip("one layout with stages is enough")
    path = tiny_models[name]
    found, *others = ranks.run(_in_flight, path, True, tp, pp, world=tp * pp, tp=tp, pp=pp)
    asked = [*SEEDS, *LATE]
    assert sorted(found) == [(i, j) for i, row in enumerate(asked) for j in range(len(row))]
    assert max(distance.max() for distance in _distances(path, found).values()) < 2e-5
    mixed = [c.versions for c in found.values() if c.versions is not None]
    assert any(len(set(versions)) == 3 for versions in mixed)
    assert all((np.diff(c.token_versions) >= 0).all() for c in found.values())
    assert all(c.policy_version == c.token_versions[0] for c in found.values())
    assert {c.policy_version for c in found.values()} >= {4, 6}  # some began after a change
    assert max(len(c.token_ids) for c in found.values()) == SPEC.max_new_tokens  # over all their parts
    for other in others:
        for place, completion in found.items():
            assert other[place].token_ids.tolist() == completion.token_ids.tolist()
            assert other[place].token_versions.tolist() == completion.token_versions.tolist()


@pytest.mark.parametrize("onednn", [False, True])
def test_copies_of_weights_are_made_anew_at_each_change_after_the_old_ones_went(ranks, tiny_models, onednn):
    (found,) = ranks.run(_in_flight_with_copies, tiny_models["qwen2"], onednn)
    assert max(distance.max() for distance in _distances(tiny_models["qwen2"], found).values()) < 2e-5


def test_with_kv_kept_what_was_drawn_before_stays_and_what_follows_stands_on_it(ranks, tiny_models):
    (found,) = ranks.run(_in_flight, tiny_models["qwen2"], False, 1, 1)
    distances = _distances(tiny_models["qwen2"], found)
    first = [distances[place][c.token_versions == c.policy_version] for place, c in found.items()]
    assert np.concatenate(first).max() < 2e-5
    later = [distances[place][c.token_versions != c.policy_version] for place, c in found.items()]
    assert np.median(np.concatenate(later)) > 1e-3  # old keys and values: nobody's fresh pass, and recorded as sampled
