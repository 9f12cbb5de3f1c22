"""A plan is right where a figure was published, and consistent everywhere; wrong words are refused by name."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.errors import ConfigError
from nemo_aapo.planning import hardware, layouts, memory, models, parameters, plan, report
from nemo_aapo.planning.inputs import Layout
from nemo_aapo.prepare.plan import prepare_plan
from tests.planning.planned import PUBLISHED_PARAMETERS, made_inputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", models.KNOWN)
def test_parameters_are_the_published_totals(name):
    assert parameters.whole(models.find(name)).total == PUBLISHED_PARAMETERS[name]


def test_active_parameters_of_a_mixture_of_experts():
    """The cards say 3.3 and 22 billion."""
    assert parameters.active(models.find("Qwen3-30B-A3B")) == pytest.approx(3.3e9, rel=0.02)
    assert parameters.active(models.find("Qwen3-235B-A22B")) == pytest.approx(22e9, rel=0.02)
    assert parameters.active(models.find("Qwen2.5-7B")) == PUBLISHED_PARAMETERS["Qwen2.5-7B"]


def test_a_mixture_of_experts_is_counted_as_transformers_builds_it():
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=160, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=20, moe_intermediate_size=24, num_experts=6,
        num_experts_per_tok=2, tie_word_embeddings=False, mlp_only_layers=[], decoder_sparse_step=1,
        norm_topk_prob=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = models.from_hugging_face(config.to_dict(), "tiny")
    assert parameters.whole(planned).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", models.KNOWN)
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2, data=4, context=2, expert=8)],
    ids=str,
)
def test_the_ranks_parameters_add_up(name, layout):
    """What is cut adds up to the whole; what every rank has, and a tied output layer's copy, come on top."""
    model = models.find(name)
    ranks = [parameters.rank_parameters(model, layout, stage) for stage in range(layout.pipeline)]
    whole = parameters.whole(model)
    assert layout.tensor * sum(rank.linear + rank.embedding for rank in ranks) == whole.linear + whole.embedding
    assert layout.expert * sum(rank.experts for rank in ranks) == whole.experts
    copy = model.vocabulary * model.hidden if model.tied and layout.pipeline > 1 else 0
    assert layout.tensor * sum(rank.output for rank in ranks) == whole.output + copy
    assert sum(rank.small for rank in ranks) >= whole.small / layout.tensor


def test_a_model_that_a_run_would_be_refused_for_is_not_planned():
    with pytest.raises(ConfigError, match="decoder_sparse_step"):
        models.from_hugging_face({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "sparse")


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("gpu", hardware.KNOWN)
@pytest.mark.parametrize("name", models.KNOWN)
def test_every_known_model_is_planned_on_every_known_gpu(name, gpu):
    made = plan.make(*prepare_plan([f"model={name}", f"hardware={gpu}", "trainer.devices=8"]))
    capacity = hardware.KNOWN[gpu].memory_bytes
    possible = [verdict for verdict in made.layouts if verdict.refused is None]
    assert all(verdict.fits == (verdict.bytes <= capacity) for verdict in possible)
    assert {verdict.layout.ranks for verdict in made.layouts} == {8}
    assert made.smallest is None or (made.smallest.fits and made.smallest.layout.ranks > 0)
    shown = report.text(made)
    assert max(map(len, shown.splitlines())) <= 120
    assert ("experts a token" in shown) == bool(made.inputs.model.experts)
    assert json.loads(json.dumps(report.tree(made)))["memory"]["peak"] == made.memory.peak


def test_layouts_that_do_not_divide_are_refused_with_the_configurations_reason():
    config, question = prepare_plan(
        ["model=Qwen2.5-7B", "trainer.devices=8"]
    )  # 28 heads, 4 key-value groups, 28 layers
    reasons = {(v.layout.tensor, v.layout.pipeline): v.refused for v in layouts.judge_all(config, question)}
    assert "28 attention heads" in reasons[8, 1]
    assert "28 layers" in reasons[1, 8]
    assert reasons[4, 2] is None


def test_a_large_model_needs_many_gpus_and_a_small_one_fits_on_one():
    small = plan.make(*prepare_plan(["model=Qwen2.5-0.5B"]))
    assert small.memory.fits
    large = plan.make(*prepare_plan(["model=Qwen2.5-72B", "trainer.devices=8", "model.recompute_granularity=full"]))
    assert not any(verdict.fits for verdict in large.layouts)
    assert large.smallest.layout.ranks * 80e9 > 16 * PUBLISHED_PARAMETERS["Qwen2.5-72B"]
    fewer = layouts.with_gpus(prepare_plan(["model=Qwen2.5-72B"])[0], large.smallest.layout.ranks // 2)
    question = prepare_plan(["model=Qwen2.5-72B"])[1]
    recomputing = dataclasses.replace(fewer, model=dataclasses.replace(fewer.model, recompute_granularity="full"))
    assert not any(verdict.fits for verdict in layouts.judge_all(recomputing, question))


# ---------------------------------------------------------------- the command


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


@pytest.mark.slow
def test_the_command_needs_no_torch_and_little_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("model=Qwen2.5-7B", "hardware=b200", "trainer.devices=8", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"]["name"] == "NVIDIA B200 SXM"
    assert after.ru_utime - before.ru_utime < 2.0
    code = "import sys, nemo_aapo.planning.report, nemo_aapo.prepare.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_exit_code_says_whether_it_fits():
    assert run("model=Qwen2.5-72B").returncode == 1
    assert "DOES NOT FIT" in run("model=Qwen2.5-72B").stdout
    assert run("--help").returncode == 0


@pytest.mark.parametrize("name", ["Qwen2.5-Math-7B", "meta-llama/Llama-3.2-1B-Instruct"])
def test_a_named_model_takes_the_place_of_a_recipes_directory(name):
    assert made_inputs("experiment=paper_qwen2_5_math_7b", f"model={name}").model == models.find(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=paper_llama3_2_1b"], "without the directory: model=Llama-3.2-1B"),
        (["hardware=h100"], "which model? model=NAME, of Qwen2.5-0.5B"),
        (["model=Qwen2.5-8B"], "did you mean 'Qwen2.5-7B'?). Known are Qwen2.5-0.5B,"),
        (["model=Qwen2.5-7B", "hardwar=h100"], "unknown setting 'hardwar' (did you mean 'hardware'?)"),
        (["model=Qwen2.5-7B", "hardware=a100"], "hardware=a100: known are h100, h200, b200"),
        (["model=Qwen2.5-7B", "model.path=/m"], "name two models"),
        (["model.path=/nowhere"], "/nowhere/config.json can't be read"),
        (["model=Qwen2.5-7B", "mean_completion_tokens=2000"], "more than rollout.max_new_tokens=1024"),
        (["model=Qwen2.5-7B", "mean_prompt_tokens=few"], "a number from 1 on is needed"),
        (["model=Qwen2.5-7B", "dataset_prompts=1.5"], "dataset_prompts=1.5: a whole number is needed"),
        (["model=Qwen2.5-7B", "tail_factor=2", "gpus=2.9"], "gpus=2.9: a whole number is needed"),
        (["model=Qwen2.5-7B", "trainer.device=8"], "did you mean 'trainer.devices'?"),
        (["model=Qwen2.5-7B", "model.tensor_model_parallel_size=8", "trainer.devices=8"], "28 attention heads"),
        (["model=Qwen2.5-7B", "precision=fp8_blockwise", "hardware=b200"], "is for Hopper"),
        (["model=Qwen3-30B-A3B", "model.lora={rank: 8, alpha: 16, target_modules: [linear_fc2]}"], "are experts here"),
        (["model=Qwen3-30B-A3B", "model.expert_model_parallel_size=2"], "does not divide the 1 ranks"),
        (
            ["model=Qwen2.5-Math-7B", "data.max_prompt_tokens=3073", "max_tokens_per_microbatch=8192"],
            "exceeds the 4096 positions",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words, message):
    with pytest.raises(ConfigError) as refused:
        plan.make(*prepare_plan(words))
    assert message in str(refused.value)


@pytest.mark.slow
def test_a_refusal_is_one_message_and_exit_code_2():
    done = run("model=nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (4, 2)], ids=lambda sizes: "TP{}-PP{}".format(*sizes))
def test_a_server_has_room_for_just_as_many_tokens_as_the_plan_says(layout):
    tp, pp = layout

    words = [f"rollout.server.tensor_parallel_size={tp}", f"rollout.server.pipeline_parallel_size={pp}"]
    words += ["model=Qwen2.5-7B", "hardware=h100", "rollout.engine=remote", "prompts_per_step=4096"]
    config, question = prepare_plan(words)
    made = plan.make(config, question)
    longest = made.inputs.work.max_sequence_tokens  # the cache has rows of so many tokens

    def server(rows: int) -> memory.ServerMemory:
        engine = dataclasses.replace(made.inputs.engine, max_concurrent_tokens=rows * longest)
        return memory.server_memory(dataclasses.replace(made.inputs, engine=engine), config.rollout.server)

    cut = 2 * parameters.whole(made.inputs.model).total / tp / pp
    assert made.server.rank.phases["serve"]["weights"] == pytest.approx(cut, rel=0.2 if pp > 1 else 0.01)
    low, high = 0, 20_000  # rows that fit, and that do not
    while high - low > 1:
        rows = (low + high) // 2
        low, high = (rows, high) if server(rows).rank.fits else (low, rows)
    assert server(low).kv_tokens // longest >= low > 0
    assert server(high).kv_tokens // longest < high
    said = report.text(made)
    assert f"servers of TP {tp} x PP {pp}" in said
    assert f"room for the KV cache of {made.server.kv_tokens:,.0f} tokens" in said
