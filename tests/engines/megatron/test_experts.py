"""A mixture of experts draws the same tokens wherever its experts are, also where ranks have to decode in step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_aapo.types import NO_ROUTE, Prompt
from tests.engines.megatron.generation import ROOMY, SEEDS, SNUG, SPEC, VOCAB_SIZE, build, flat, prompts
from tests.engines.megatron.test_engine import plain_logprobs
from tests.marks import exact_for
from tests.rollout.test_collector import Scores

LAYOUTS = {  # ranks, TP, PP, EP
    "TP2": (2, 2, 1, 1),
    "TP2 EP2": (2, 2, 1, 2),
    "DP2": (2, 1, 1, 1),
    "DP2 EP2": (2, 1, 1, 2),
    "PP2 DP2 EP2": (4, 1, 2, 2),
    "TP2 DP2 EP2": (4, 2, 1, 2),
    "TP2 DP2 EP4": (4, 2, 1, 4),
    "DP4 EP4": (4, 1, 1, 4),
}


def own_completions(path, tp, pp):
    """This data-parallel rank's completions by prompt: of DP prompts every DP-th."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    engine = MegatronEngine(build(path, tp, pp, tp > 1), VOCAB_SIZE, SNUG, record_routes=True)
    mine = range(parallel.data_parallel_rank(), len(SEEDS), parallel.data_parallel_size())
    out = engine.generate([prompts()[i] for i in mine], SPEC, [SEEDS[i] for i in mine])
    return dict(zip(mine, out, strict=True))


@pytest.fixture(scope="module")
def on_one_rank(ranks, tiny_models):
    [completions] = ranks.run(own_completions, tiny_models["qwen3_moe"], 1, 1)
    return completions


@pytest.mark.parametrize("layout", exact_for(LAYOUTS, "TP2 EP2", "DP2 EP2"))
def test_every_layout_of_experts_draws_the_same_tokens_by_the_same_experts(ranks, tiny_models, on_one_rank, layout):
    world, tp, pp, ep = LAYOUTS[layout]
    for own in ranks.run(own_completions, tiny_models["qwen3_moe"], tp, pp, world=world, tp=tp, pp=pp, ep=ep):
        for i, row in own.items():
            assert flat([row]) == flat([on_one_rank[i]])
            for completion, expected in zip(row, on_one_rank[i], strict=True):
                np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-5)
                np.testing.assert_array_equal(completion.routes.prompt, expected.routes.prompt)
                np.testing.assert_array_equal(completion.routes.completion, expected.routes.completion)


def test_every_token_that_was_fed_has_a_route_and_a_prompt_has_one_for_all_its_completions(on_one_rank):
    """But for a prompt's tokens in the last layer, of which only the last one's result is read."""
    for i, row in on_one_rank.items():
        for completion in row:
            prompt, routes = completion.routes.prompt, completion.routes.completion
            assert prompt is row[0].routes.prompt
            assert (prompt.dtype, prompt.shape) == (np.uint8, (len(prompts()[i]), 4, 2))
            assert routes.shape == (len(completion.token_ids) - 1, 4, 2)
            assert max(routes.max(initial=0), prompt[:, :3].max(), prompt[-1].max()) < 8
            assert (prompt[:-1, 3] == NO_ROUTE).all()
            assert (routes[..., 0] != routes[..., 1]).all()


@pytest.mark.exact
def test_the_weights_of_experts_may_be_their_share_in_the_softmax_over_all(ranks, tiny_models, tmp_path):
    """``norm_topk_prob`` is false in transformers where a model says nothing of it."""
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(tiny_models["qwen3_moe"], tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    [completions] = ranks.run(own_completions, path, 1, 1)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for i in (0, 1):
        for completion in completions[i]:
            expected = plain_logprobs(model, prompts()[i], completion.token_ids, SPEC)
            chosen = np.take_along_axis(expected, completion.token_ids[:, None].astype(int), 1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-5)


def _in_step(path, case):
    """What each of two ranks gets that share experts: completions, or an error."""
    import torch

    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    rank = parallel.data_parallel_rank()
    model = build(path, tp=parallel.tensor_parallel_size(), pp=parallel.pipeline_parallel_size())
    if case == "overflow" and rank == 1:
        model.decoder.final_layernorm.weight.data[0] = torch.nan
    engine = MegatronEngine(model, VOCAB_SIZE, 42 if case == "budget" and rank == 1 else ROOMY)
    calls = 0

    def on_finish(i, j, completion):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3 and (case == "enough" or torch.distributed.get_rank() == 1):
            if case == "reward":
                raise OSError("the reward's disk is full")
            return case == "enough"
        return False

    idle = case == "no prompts" and rank == 1
    try:
        out = engine.generate([] if idle else prompts(), SPEC, [] if idle else SEEDS, on_finish)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return flat(out)


def test_ranks_in_step_end_together_or_go_on_lending_their_experts(ranks, tiny_models, on_one_rank):
    whole = flat([on_one_rank[i] for i in range(len(SEEDS))])
    answers = {
        case: ranks.run(_in_step, tiny_models["qwen3_moe"], case, world=2, ep=2, timeout_s=60)
        for case in ("no prompts", "enough", "budget", "overflow", "reward")
    }
    assert answers["no prompts"] == [whole, []]
    going_on, broken_off = answers["enough"]
    assert going_on == whole
    assert len(broken_off) < len(whole)
    assert all(tokens in whole for tokens in broken_off)
    assert answers["budget"][0] == answers["budget"][1]
    assert "rollout.max_concurrent_tokens=42" in answers["budget"][0]
    assert answers["overflow"][0] == answers["overflow"][1]
    assert answers["overflow"][0].startswith("FloatingPointError: policy version 0 gives log-probs that are not finite")
    assert answers["reward"] == [f"{kind}: the reward's disk is full" for kind in ("RuntimeError", "OSError")]


def test_an_error_of_one_stage_of_one_rank_ends_all_stages_of_all_ranks(ranks, tiny_models):
    """Only ranks of one stage share experts; the stages of a copy of the model must not wait for each other either."""
    answers = ranks.run(_in_step, tiny_models["qwen3_moe"], "reward", world=4, pp=2, ep=2, timeout_s=60)
    assert answers == [f"{'OSError' if rank == 1 else 'RuntimeError'}: the reward's disk is full" for rank in range(4)]


def _collect(path):
    """Groups as plain data, the engine's steps, and those that it takes if ranks keep to their own prompts."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.rollout.collector import Collector
    from nemo_aapo.rollout.spread import own_shard

    engine = MegatronEngine(build(path), VOCAB_SIZE, 2 * 43, record_routes=True)
    questions = [Prompt(str(i), prompts()[i], "", "", "") for i in (0, 1, 2, 3)]
    seeds = [[100 * i + j for j in range(size)] for i, size in enumerate((6, 6, 1, 1))]
    collector = Collector(engine, Scores(), lambda ids: str(ids.tolist()))
    groups = collector.collect(questions, SPEC, seeds, observe_lengths=False)
    assert all(c.routes.prompt is group.completions[0].routes.prompt for group in groups for c in group.completions)
    steps, mine = engine.stats.steps, own_shard(4)
    engine.generate([q.token_ids for q in questions[mine]], SPEC, seeds[mine])
    plain = [(g.prompt.id, [c.token_ids.tolist() for c in g.completions], g.texts, g.rewards.tolist()) for g in groups]
    return plain, steps, engine.stats.steps


def test_ranks_in_step_share_out_completions_and_each_has_its_own_groups_again(ranks, tiny_models):
    path = tiny_models["qwen3_moe"]
    ((alone, *_),) = ranks.run(_collect, path)
    (first, *steps), (second, *steps_too) = ranks.run(_collect, path, world=2, ep=2)
    assert first + second == alone
    assert [name for name, *_ in first] == ["0", "1"]
    spread, by_prompt = (max(pair) for pair in zip(steps, steps_too, strict=True))
    assert spread < 0.75 * by_prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [("moe_router_score_function", "sigmoid"), ("moe_shared_expert_intermediate_size", 8), ("moe_layer_freq", 2)],
)
def test_experts_that_the_decoder_does_not_compute_are_refused_by_name(field, value):
    from nemo_aapo.engines.megatron.decoder import expert_settings

    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    supported = SimpleNamespace(**{name: wanted for name, (_, wanted) in expert_settings(_Anything()).items()} | layout)
    assert all(found == wanted for found, wanted in expert_settings(supported).values())
    setattr(supported, field, value)
    assert [name for name, (found, wanted) in expert_settings(supported).items() if found != wanted] == [field]


class _Anything:
    """A configuration with every field."""

    def __getattr__(self, name: str) -> int:
        return 1


def test_transformer_engines_experts_are_asked_as_mcore_asks_them():
    """Its grouped product through mcore's module around it, never run: TransformerEngine needs a GPU."""
    import torch

    from nemo_aapo.mcore.experts.weights import local_experts

    weights = torch.randn(3, 6, 4)

    class Grouped(torch.nn.Module):
        def forward(self, x, m_splits):
            assert isinstance(m_splits, list)
            parts = x.split(m_splits)
            return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)]), None

    class TEGroupedMLP(torch.nn.Module):
        num_local_experts = 3

        def __init__(self):
            super().__init__()
            self.linear_fc1, self.linear_fc2 = Grouped(), Grouped()

    layer = torch.nn.Module()
    layer.router, layer.experts = torch.nn.Linear(4, 6, bias=False), TEGroupedMLP()
    found, x = local_experts(layer), torch.randn(5, 4)
    expected = torch.cat([x[:2] @ weights[0].t(), x[2:] @ weights[2].t()])
    torch.testing.assert_close(found.gate_and_up(x, [2, 0, 3]), expected)
    assert found.count == 3
    source = _mcore_source("extensions/transformer_engine.py")
    assert "class TEGroupedLinear(" in source
    assert "def forward(self, x, m_splits):" in source
    assert "self.num_local_experts = num_local_experts" in _mcore_source("transformer/moe/experts.py")


def _mcore_source(name: str) -> str:
    import megatron.core

    return (Path(megatron.core.__file__).parent / name).read_text()
