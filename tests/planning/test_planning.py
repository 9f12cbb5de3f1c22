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
from nemo_aapo.planning import compute, hardware, layouts, memory, models, parameters, plan, report, request
from nemo_aapo.planning.inputs import Inputs, Layout, plan_inputs

ROOT = Path(__file__).resolve().parents[2]

PUBLISHED_PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
}
"""The totals of the safetensors headers, as the Hugging Face Hub shows them."""


def made_inputs(*words: str) -> Inputs:
    return plan_inputs(*request.read(words))


@pytest.mark.parametrize("name", models.KNOWN)
def test_parameters_are_the_published_totals(name):
    assert parameters.whole(models.find(name)).total == PUBLISHED_PARAMETERS[name]


def test_active_parameters_of_a_mixture_of_experts():
    """Qwen3-30B-A3B's card says 3.3 billion."""
    assert parameters.active(models.find("Qwen3-30B-A3B")) == pytest.approx(3.3e9, rel=0.02)
    assert parameters.active(models.find("Qwen2.5-7B")) == PUBLISHED_PARAMETERS["Qwen2.5-7B"]


def test_a_mixture_of_experts_is_counted_as_transformers_builds_it():
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=160, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=20, moe_intermediate_size=24, num_experts=6,
        num_experts_per_tok=2, tie_word_embeddings=False, mlp_only_layers=[], decoder_sparse_step=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = models.from_hugging_face(config.to_dict(), "tiny")
    assert parameters.whole(planned).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", models.KNOWN)
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2), Layout(pipeline=4), Layout(tensor=2, pipeline=4)], ids=str
)
def test_the_ranks_parameters_add_up(name, layout):
    """What is cut adds up to the whole; what every rank has, and a tied output layer's copy, come on top."""
    model = models.find(name)
    ranks = [parameters.rank_parameters(model, layout, stage) for stage in range(layout.pipeline)]
    whole = parameters.whole(model)
    assert layout.tensor * sum(rank.linear + rank.experts + rank.embedding for rank in ranks) == (
        whole.linear + whole.experts + whole.embedding
    )
    copy = model.vocabulary * model.hidden if model.tied and layout.pipeline > 1 else 0
    assert layout.tensor * sum(rank.output for rank in ranks) == whole.output + copy
    assert sum(rank.small for rank in ranks) >= whole.small / layout.tensor


# ---------------------------------------------------------------- time


def test_decoding_is_bounded_by_reading_weights_and_cache():
    """Qwen2.5-7B on an H200 at context 1500: 3.2 ms a token alone, 33,000 tokens/s at 256 rows."""
    inputs, rates = made_inputs("model=Qwen2.5-7B", "hardware=h200"), hardware.KNOWN["h200"].peak
    assert compute.decode_step_seconds(inputs, rates, 1, 1500) == pytest.approx(3.2e-3, rel=0.08)
    assert 256 / compute.decode_step_seconds(inputs, rates, 256, 1500) == pytest.approx(33e3, rel=0.08)
    assert compute.straggler_seconds(inputs, rates, 4096) == pytest.approx(13, rel=0.08)


@pytest.mark.parametrize(
    ("name", "precision", "seconds"),
    [
        ("Qwen2.5-1.5B", "bf16", 0.581),
        ("Qwen2.5-1.5B", "fp8_tensorwise", 0.477),
        ("Qwen2.5-0.5B", "bf16", 0.249),
        ("Qwen2.5-0.5B", "fp8_tensorwise", 0.276),
    ],
)
def test_a_training_step_on_an_h200_took_longer_than_its_bound(name, precision, seconds):
    """Seconds of an optimizer step on 32 sequences of 512 + 512 tokens, as measured (see ``MEASURED_PEAK_GIB``)."""
    lengths = ("data.max_prompt_tokens=512", "rollout.max_new_tokens=512", "max_tokens_per_microbatch=32768")
    words = (f"precision={precision}", "prompts_per_step=4", "group_size=8")
    inputs = made_inputs(f"model={name}", "hardware=h200", *lengths, *words)
    for rates in (inputs.hardware.peak, inputs.hardware.measured):
        assert seconds / 5 < compute.train_phase(inputs, rates).seconds < seconds


def test_training_takes_six_flops_for_each_parameter_and_token():
    inputs = made_inputs("model=Qwen2.5-7B", "data.max_prompt_tokens=64", "rollout.max_new_tokens=64")
    count = parameters.whole(inputs.model)
    each = compute.train_flops(inputs).total / inputs.work.tokens
    assert each == pytest.approx(6 * (count.total - count.embedding), rel=0.05)
    assert compute.score_flops(inputs).total / inputs.work.tokens == pytest.approx(each / 3, rel=0.05)


def test_gradients_cross_the_network_only_where_data_parallel_ranks_lie_on_several_nodes():
    words = ("model=Qwen2.5-7B", "model.tensor_model_parallel_size=4", "model.sequence_parallel=true")
    seconds = {}
    for nodes, devices, more in ((1, 8, []), (2, 4, []), (2, 4, ["model.optim.overlap_grad_reduce=true"])):
        inputs = made_inputs(*words, f"trainer.num_nodes={nodes}", f"trainer.devices={devices}", *more)
        phase = compute.train_phase(inputs, hardware.KNOWN["h100"].peak)
        seconds[nodes, devices, len(more)] = phase.seconds
    assert seconds[1, 8, 0] < seconds[2, 4, 1] < seconds[2, 4, 0]


def test_an_aapo_step_needs_no_scoring_and_grpos_does():
    names = ("algorithm=aapo", "algorithm=gpg", "algorithm=grpo")
    passes = [made_inputs("model=Qwen2.5-7B", name).work.scoring_passes for name in names]
    assert passes == [0, 0, 1]
    assert made_inputs("model=Qwen2.5-7B", "algorithm=grpo", "algorithm.updates_per_rollout=2").work.scoring_passes == 2


def test_mean_lengths_are_an_input_and_default_to_the_limits():
    longest = made_inputs("model=Qwen2.5-7B").work
    assert (longest.prompt_tokens, longest.completion_tokens) == (512, 1024)
    shorter = made_inputs("model=Qwen2.5-7B", "mean_prompt_tokens=100", "mean_completion_tokens=300.5").work
    assert shorter.tokens == 128 * 400.5


def test_fresh_reference_rewards_cost_a_second_rollout_and_stored_ones_nothing():
    rates = hardware.KNOWN["h100"].peak
    steps = {}
    for name in ("aapo", "aapo_paper"):
        inputs = made_inputs("model=Qwen2.5-7B", f"algorithm={name}")
        steps[name] = {phase.name: phase for phase in compute.step(inputs, rates)}
    rollout = steps["aapo"]["prefill"].tokens + steps["aapo"]["decode"].tokens
    assert steps["aapo"]["reference"].seconds == 0
    assert steps["aapo_paper"]["reference"].tokens == rollout
    assert steps["aapo_paper"]["reference"].seconds >= steps["aapo"]["decode"].seconds


def test_the_store_saves_what_prompts_that_come_again_would_cost():
    words = ("model=Qwen2.5-7B", "trainer.max_steps=100")  # 1,600 prompts, 8 completions each
    once = compute.store_saving(made_inputs(*words), hardware.KNOWN["h100"].peak)
    assert once.online_completions == once.stored_completions == 12_800
    again = compute.store_saving(made_inputs(*words, "dataset_prompts=400"), hardware.KNOWN["h100"].peak)
    assert (again.online_completions, again.stored_completions) == (12_800, 3_200)
    assert again.stored_seconds == pytest.approx(again.online_seconds / 4)


# ---------------------------------------------------------------- memory


def test_bytes_of_a_parameter_are_mcores():
    """bf16: 2 weights, 4 gradients, 4 + 8 optimizer; fp32: 4, 4, 8; the optimizer's over the data-parallel ranks."""
    words = ("model=Qwen2.5-0.5B", "trainer.devices=4")
    total = PUBLISHED_PARAMETERS["Qwen2.5-0.5B"]
    for precision, (weights, state) in {"auto": (2, 12), "bf16": (2, 12), "fp32": (4, 8)}.items():
        whole = memory.rank_memory(
            made_inputs(*words, f"precision={precision}", "model.optim.use_distributed_optimizer=false")
        )
        dealt = memory.rank_memory(made_inputs(*words, f"precision={precision}"))
        train = whole.phases["train"]
        assert (train["weights"], train["gradients"], train["optimizer"]) == (weights * total, 4 * total, state * total)
        assert dealt.phases["train"]["optimizer"] == state * total / 4


def test_adapters_take_the_gradients_and_the_optimizer_of_adapters():
    """Rank 16 on all layers of Qwen2.5-7B: 40,370,176 parameters, as ``peft`` prints for the seven matrices.

    ``peft`` has three A for q, k, v and two for gate and up, where Megatron has one: 28 x 16 x 3 x 3,584 fewer here.
    """
    lora = "model.lora={rank: 16, alpha: 32, target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]}"
    plain, inputs = made_inputs("model=Qwen2.5-7B"), made_inputs("model=Qwen2.5-7B", lora)
    adapters = 40_370_176 - 28 * 16 * 3 * 3584
    train = memory.rank_memory(inputs).phases["train"]
    assert (train["gradients"], train["optimizer"]) == (4 * adapters, 12 * adapters)
    assert train["weights"] == 2 * (PUBLISHED_PARAMETERS["Qwen2.5-7B"] + adapters)
    assert memory.rank_memory(inputs).host == {"reference weights": 2 * adapters}
    ratio = compute.train_flops(inputs).layers / compute.train_flops(plain).layers
    assert ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("word", "phase"),
    [
        ("model.recompute_granularity=full", "train"),
        ("model.recompute_granularity=selective model.recompute_modules=[mlp]", "train"),
        ("max_tokens_per_microbatch=2048", "train"),
        ("precision=fp8_tensorwise", "activations"),
        ("model.optim.cpu_offload_fraction=0.5", "train"),
        ("rollout.offload_learner=true", "rollout"),
        ("rollout.max_concurrent_tokens=8192", "rollout"),
    ],
)
def test_what_is_meant_to_save_memory_saves_some(word, phase):
    plain = memory.rank_memory(made_inputs("model=Qwen2.5-7B"))
    saving = memory.rank_memory(made_inputs("model=Qwen2.5-7B", *word.split()))
    if phase == "activations":
        assert saving.phases["train"][phase] < plain.phases["train"][phase]
    else:
        assert saving.total(phase) < plain.total(phase)


def test_what_leaves_the_gpu_is_in_host_memory():
    plain = memory.rank_memory(made_inputs("model=Qwen2.5-7B", "algorithm=gpg"))
    state = plain.phases["train"]["optimizer"]
    half = memory.rank_memory(made_inputs("model=Qwen2.5-7B", "algorithm=gpg", "model.optim.cpu_offload_fraction=0.5"))
    assert half.phases["train"]["optimizer"] == half.host["optimizer"] == state / 2
    lent = memory.rank_memory(made_inputs("model=Qwen2.5-7B", "algorithm=gpg", "rollout.offload_learner=true"))
    assert lent.host == {"optimizer, while the engine draws": state}
    assert plain.host == {}


def test_the_cache_of_the_in_process_engine_has_a_row_for_each_longest_sequence():
    inputs = made_inputs("model=Qwen2.5-7B", "rollout.max_concurrent_tokens=16384")
    assert memory.rows_at_a_time(inputs) == 16384 // 1536
    cache = memory.rank_memory(inputs).phases["rollout"]["KV cache"]
    assert cache == 10 * 1536 * 28 * 2 * 4 * 128 * 2  # rows, tokens, layers, keys and values, heads, size, bytes


def test_an_engine_elsewhere_takes_nothing_of_the_learners_memory():
    inputs = made_inputs("model=Qwen2.5-7B", "rollout.engine=remote")
    assert set(memory.rank_memory(inputs).phases) == {"train"}
    refit = {phase.name: phase for phase in compute.step(inputs, hardware.KNOWN["h100"].peak)}["refit"]
    assert refit.seconds > 0


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "chunk"), [(256, 8), (256, 64), (64, 64)])
def test_the_logits_chunk_is_what_log_probs_take_at_their_peak(numbers, tokens, chunk):
    import torch

    from tests.learner.test_logprobs import make_problem, one_rank, peak_bytes

    vocabulary, hidden_size = 32_768, 64
    dtype = torch.float32 if numbers == "fp32" else torch.bfloat16
    hidden, weight, targets, _ = make_problem(tokens, vocabulary, vocabulary, h=hidden_size, dtype=dtype)
    measured = peak_bytes(lambda: one_rank(hidden, weight, targets, 0.7, vocabulary, chunk), hidden, weight, targets)
    inputs = made_inputs("model=Qwen2.5-7B")
    model = dataclasses.replace(inputs.model, hidden=hidden_size, vocabulary=vocabulary)
    learner = dataclasses.replace(inputs.learner, kind="local", numbers=numbers, logprob_chunk_tokens=chunk)
    planned = memory.logprobs(dataclasses.replace(inputs, model=model, learner=learner), tokens)
    assert planned == pytest.approx(measured, rel=0.1)


MEASURED_PEAK_GIB = [
    ("Qwen2.5-1.5B", "bf16", 16_384, 58.44),
    ("Qwen2.5-1.5B", "bf16", 32_768, 90.37),
    ("Qwen2.5-1.5B", "fp8_tensorwise", 32_768, 82.83),
    ("Qwen2.5-1.5B", "fp8_blockwise", 32_768, 83.16),
    ("Qwen2.5-0.5B", "bf16", 32_768, 38.99),
    ("Qwen2.5-0.5B", "fp8_tensorwise", 32_768, 34.98),
    ("Qwen2.5-0.5B", "fp8_blockwise", 32_768, 35.14),
]
"""Model, precision, tokens of a micro-batch, ``torch.cuda.max_memory_allocated`` in GiB over training steps.

Measured on an H200 with TransformerEngine 2.11 and torch 2.11 by ``benchmarks/gpu.py``: one rank, a
distributed optimizer, packed sequences of 512 prompt and 512 completion tokens.
"""


@pytest.mark.parametrize(("name", "precision", "tokens", "measured"), MEASURED_PEAK_GIB)
def test_the_peak_of_a_training_step_is_what_an_h200_showed(name, precision, tokens, measured):
    """In all within 2 %, and of activations and log-probs, which the formulas are about, within 3 %."""
    words = (f"precision={precision}", f"max_tokens_per_microbatch={tokens}")
    lengths = ("data.max_prompt_tokens=512", "rollout.max_new_tokens=512")
    train = memory.rank_memory(made_inputs(f"model={name}", "hardware=h200", *words, *lengths)).phases["train"]
    planned = sum(train.values()) - train["runtime (assumed)"]  # the allocator sees nothing of it
    state = sum(train[part] for part in ("weights", "gradients", "optimizer"))
    assert planned == pytest.approx(measured * 2**30, rel=0.02)
    assert planned - state == pytest.approx(measured * 2**30 - state, rel=0.03)


def test_the_logits_chunk_is_what_an_h200_showed():
    """8,192 scored tokens, hidden size 1,536, bf16: 1,054,114,816 bytes (logprob_memory of benchmarks/gpu.py)."""
    inputs = made_inputs("model=Qwen2.5-1.5B", "hardware=h200", "model.logprob_chunk_tokens=64")
    assert memory.logprobs(inputs, 8192) == pytest.approx(1_054_114_816, rel=0.001)


def test_tiles_of_log_probs_are_planned_as_large_as_they_are():
    from nemo_aapo.learner import logprobs as logprob

    sizes = {"local": logprob.MIN_TILE_LOGITS, "transformer_engine": logprob.CUDA_MIN_TILE_LOGITS}
    assert (sizes, logprob.TILE_ALIGNMENT) == (memory.MIN_TILE_LOGITS, memory.TILE_ALIGNMENT)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("gpu", hardware.KNOWN)
@pytest.mark.parametrize("name", models.KNOWN)
def test_every_known_model_is_planned_on_every_known_gpu(name, gpu):
    made = plan.make(*request.read([f"model={name}", f"hardware={gpu}", "trainer.devices=8"]))
    capacity = hardware.KNOWN[gpu].memory_bytes
    possible = [verdict for verdict in made.layouts if verdict.refused is None]
    assert all(verdict.fits == (verdict.bytes <= capacity) for verdict in possible)
    assert {verdict.layout.ranks for verdict in made.layouts} == {8}
    assert made.smallest is None or (made.smallest.fits and made.smallest.layout.ranks > 0)
    shown = report.text(made)
    assert max(map(len, shown.splitlines())) <= 120
    assert ("refused today" in shown) == bool(made.inputs.model.experts)
    assert json.loads(json.dumps(report.tree(made)))["memory"]["peak"] == made.memory.peak


def test_layouts_that_do_not_divide_are_refused_with_the_configurations_reason():
    config, question = request.read(
        ["model=Qwen2.5-7B", "trainer.devices=8"]
    )  # 28 heads, 4 key-value groups, 28 layers
    reasons = {(v.layout.tensor, v.layout.pipeline): v.refused for v in layouts.judge_all(config, question)}
    assert "28 attention heads" in reasons[8, 1]
    assert "28 layers" in reasons[1, 8]
    assert reasons[4, 2] is None


def test_a_large_model_needs_many_gpus_and_a_small_one_fits_on_one():
    small = plan.make(*request.read(["model=Qwen2.5-0.5B"]))
    assert small.memory.fits
    large = plan.make(*request.read(["model=Qwen2.5-72B", "trainer.devices=8", "model.recompute_granularity=full"]))
    assert not any(verdict.fits for verdict in large.layouts)
    assert large.smallest.layout.ranks * 80e9 > 16 * PUBLISHED_PARAMETERS["Qwen2.5-72B"]
    fewer = layouts.with_gpus(request.read(["model=Qwen2.5-72B"])[0], large.smallest.layout.ranks // 2)
    question = request.read(["model=Qwen2.5-72B"])[1]
    recomputing = dataclasses.replace(fewer, model=dataclasses.replace(fewer.model, recompute_granularity="full"))
    assert not any(verdict.fits for verdict in layouts.judge_all(recomputing, question))


# ---------------------------------------------------------------- the command


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


def test_the_command_needs_no_torch_and_little_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("model=Qwen2.5-7B", "hardware=b200", "trainer.devices=8", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hardware"]["name"] == "NVIDIA B200 SXM"
    assert after.ru_utime - before.ru_utime < 2.0
    code = "import sys, nemo_aapo.planning.report, nemo_aapo.planning.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0


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
        (["model=Qwen2.5-7B", "trainer.device=8"], "did you mean 'trainer.devices'?"),
        (["model=Qwen2.5-7B", "model.tensor_model_parallel_size=8", "trainer.devices=8"], "28 attention heads"),
        (["model=Qwen2.5-7B", "precision=fp8_blockwise", "hardware=b200"], "is for Hopper"),
        (
            ["model=Qwen2.5-Math-7B", "data.max_prompt_tokens=3073", "max_tokens_per_microbatch=8192"],
            "exceeds the 4096 positions",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(words, message):
    with pytest.raises(ConfigError) as refused:
        plan.make(*request.read(words))
    assert message in str(refused.value)


def test_a_refusal_is_one_message_and_exit_code_2():
    done = run("model=nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
