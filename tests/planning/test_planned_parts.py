"""Parts of a rank's memory: bytes of a parameter, savings, log-probs, and peaks that an H200 showed."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_aapo.planning import compute, hardware, memory
from tests.planning.planned import PUBLISHED_PARAMETERS, made_inputs


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


def test_attention_is_computed_again_where_it_is_recomputed_and_only_there():
    words = {"mlp": "selective model.recompute_modules=[mlp]", "attention": "selective", "full": "full"}
    words = {name: f"model.recompute_granularity={word}".split() for name, word in words.items()}
    made = {name: made_inputs("model=Qwen2.5-7B", *more) for name, more in {"none": [], **words}.items()}
    flops = {name: compute.train_flops(inputs) for name, inputs in made.items()}
    once = compute.forward(made["none"], 0, compute._pairs(made["none"]), 0).rest
    again = {name: (found.rest - flops["none"].rest) / once for name, found in flops.items()}
    assert again == pytest.approx({"none": 0, "mlp": 0, "attention": 1, "full": 1})
    assert flops["mlp"].layers == flops["attention"].layers == flops["none"].layers == flops["full"].layers * 3 / 4


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


def test_servers_that_share_the_learners_gpus_are_in_its_memory_as_the_engine_in_its_processes_is():
    apart = ("rollout.engine=remote", "rollout.refit=ipc", "rollout.server.engine=trtllm")
    cut = ("model=Qwen2.5-7B", "trainer.devices=8", "model.tensor_model_parallel_size=2")
    within, beside = (memory.rank_memory(made_inputs(*cut, *words)) for words in (["rollout.engine=trtllm"], apart))
    assert beside.phases["rollout"] == within.phases["rollout"]
    assert "rollout" not in memory.rank_memory(made_inputs("model=Qwen2.5-7B", *apart, "rollout.refit=files")).phases
