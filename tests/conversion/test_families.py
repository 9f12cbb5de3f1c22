"""Families of the table: converted to the byte, computed as by transformers, trained and sampled on any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_aapo.types import SamplingSpec
from tests.engines.megatron.generation import VOCAB_SIZE, flat
from tests.families import FAMILIES, make_family

pytestmark = pytest.mark.exact
SP, PACKED = {"model__sequence_parallel": True}, {"model__sequence_packing": True}
SHARED = {**PACKED, "model__share_prompts": True}
LAYOUTS = {  # TP, PP, EP, CP, ranks, and what else is set
    "alone": (1, 1, 1, 1, 1, {}),
    "TP2": (2, 1, 1, 1, 2, SP | PACKED),
    "PP2": (1, 2, 1, 1, 2, SHARED | {"model__recompute_granularity": "full"}),
    "CP2": (1, 1, 1, 2, 2, PACKED),
    "EP2": (1, 1, 2, 1, 2, PACKED),
}
SPEC = SamplingSpec(temperature=0.8, max_new_tokens=20, stop_token_ids=(3, 7), min_new_tokens=2)
SEEDS = [[1000 * i + j for j in range(3)] for i in range(4)]


def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, 150, n).astype(np.int32) for n in (3, 17, 1, 9)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, ranks, tmp_path_factory) -> tuple[str, Path, tuple]:
    """Its name, its model, and what one process learns and samples."""
    path = make_family(request.param, tmp_path_factory.mktemp("families"))
    [alone] = ranks.run(learned_and_sampled, path, "alone", FAMILIES[request.param].decoded)
    return request.param, path, alone


def learned_and_sampled(path, layout, decoded):
    """On this rank: what the engines sample, alone both of them; metrics and weights after one update."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.engines.plain import PlainEngine
    from tests.learner.test_layouts import update

    tp, pp, ep, cp, _, more = LAYOUTS[layout]
    settings = {**more, "model__expert_model_parallel_size": ep, "model__context_parallel_size": cp}
    sampled = []

    def before(policy):
        engines: list = [MegatronEngine(policy.module, VOCAB_SIZE, 5 * 37)] if decoded else []
        if layout == "alone" or (cp == 1 and not decoded):
            engines.append(PlainEngine(policy.module, VOCAB_SIZE, 5 * 37, multiple=tp))
        sampled.extend(engine.generate(prompts(), SPEC, SEEDS) for engine in engines)

    policy, metrics = update(path, tp, pp, 128, settings, before=before)
    weights = {name: tensor.numpy().copy() for name, tensor in policy.named_weights()}
    return sampled, metrics, weights


def test_every_byte_survives_and_the_logits_are_those_of_transformers(ranks, family, tmp_path):
    from safetensors.torch import load_file

    from tests.conversion.test_conversion import _verify, convert_there_and_back

    name, path, _ = family
    ranks.run(convert_there_and_back, path, tmp_path)
    before = load_file(path / "model.safetensors")
    after: dict = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert {key: tensor.numpy().tobytes() for key, tensor in before.items()} == {
        key: tensor.numpy().tobytes() for key, tensor in after.items()
    }
    [verdict, *_] = ranks.run(_verify, path, path, world=2, pp=2)
    assert not verdict.different
    assert verdict.max_logit_difference < 1e-5, name
    assert verdict.same_choice == 1.0


@pytest.mark.exact
def test_what_is_sampled_is_what_transformers_says_and_the_plain_engine_draws(family):
    from transformers import AutoModelForCausalLM

    from tests.engines.megatron.test_engine import plain_logprobs

    _, path, (sampled, _, _) = family
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for prompt, row, others in zip(prompts(), sampled[0], sampled[-1], strict=True):
        for completion, other in zip(row, others, strict=True):
            assert completion.token_ids.tolist() == other.token_ids.tolist()
            expected = plain_logprobs(model, prompt, completion.token_ids, SPEC)
            chosen = np.take_along_axis(expected, completion.token_ids[:, None].astype(int), 1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-5)
            np.testing.assert_allclose(other.logprobs, chosen, atol=1e-5)


@pytest.mark.exact
def test_every_layout_learns_and_samples_the_same(ranks, family):
    name, path, (sampled, expected, weights) = family
    alone = flat(sampled[0])
    for layout in FAMILIES[name].layouts:
        tp, pp, ep, cp, world, _ = LAYOUTS[layout]
        for engines, metrics, updated in ranks.run(
            learned_and_sampled, path, layout, FAMILIES[name].decoded, world=world, tp=tp, pp=pp, ep=ep, cp=cp
        ):
            assert all(flat(own) == alone for own in engines), layout
            # A mean of terms of both signs: what rounding makes of it goes by their size, not by what is left.
            assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-6), layout
            assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), layout
            for key, tensor in updated.items():
                np.testing.assert_allclose(tensor, weights[key], atol=2e-6, err_msg=f"{layout}: {key}")
