"""Measures one GPU: the learner's MFU, memory of log-probs, decoding against the bandwidth's floor, parity.

Models have the shapes of Qwen2.5 and random weights. Operations and bytes are counted, the ceilings of bandwidth and
matrix products measured in the same run.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_models import SHAPES, VOCABULARY, config_of, fitting, random_batch, random_model, usable_precisions
from benchmarks.parity import learner_of, sample

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Name of a GPU -> dense bf16 FLOP/s by NVIDIA's datasheet of its SXM part; MFU is measured against it."""
PRECISIONS = ("bf16", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed")


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the measurement."""

    shapes: tuple[str, ...] = ("0.5B", "1.5B")
    sequence: int = 1024
    """Tokens of a sequence, half of them prompt."""
    micro_batch_tokens: int = 32_768
    """Most tokens of a micro-batch; fewer if the GPU's memory is too small."""
    micro_batches: int = 4
    steps: int = 3
    decode_rows: tuple[int, ...] = (64, 256)
    decode_prompt: int = 512
    decode_tokens: int = 256


QUICK = Plan(shapes=("0.5B",), micro_batch_tokens=4096, steps=1, decode_rows=(16,), decode_tokens=16)


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure everything, and print it as it comes. FP8 precisions that the GPU can't compute in are left out.

    Args:
        folder: gets the models' files.

    Raises:
        ConfigError: the GPU can't compute in bf16, or TransformerEngine is not installed.
    """
    from nemo_aapo.launch.world import Machine, decide
    from nemo_aapo.learner.policy import MegatronPolicy
    from nemo_aapo.models.directory import read_model_dir

    usable = usable_precisions(PRECISIONS)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    found["ceilings"] = ceilings()
    print(json.dumps(found), flush=True)
    found["logprobs"] = logprob_memory()
    print(json.dumps(found["logprobs"]), flush=True)
    found["learner"], found["decode"], found["parity"] = [], [], []
    for name in plan.shapes:
        path = random_model(SHAPES[name], folder / name)
        memory = torch.cuda.get_device_properties(0).total_memory
        tokens = fitting(path, plan.micro_batch_tokens, plan.sequence, memory)
        sized = dataclasses.replace(plan, micro_batch_tokens=tokens)
        for precision in usable:
            config = config_of(path, precision, tokens, plan.sequence)
            policy = MegatronPolicy(decide(config, Machine.present()), read_model_dir(str(path)))
            policy.prepare_training()
            found["learner"].append({"model": name, "precision": precision, **learner(policy, sized)})
            parity = learner_of(policy, tokens).parity(sample(policy))
            found["parity"].append({"model": name, "precision": precision, **parity})
            print(json.dumps([found["learner"][-1], found["parity"][-1]]), flush=True)
            if precision == "bf16":
                for rows in plan.decode_rows:
                    figures = decode(policy, plan, rows, found["ceilings"]["bytes_per_s"])
                    found["decode"].append({"model": name, "rows": rows, **figures})
                    print(json.dumps(found["decode"][-1]), flush=True)
            del policy  # otherwise its memory would be free only when the next one is built
            gc.collect()
            torch.cuda.empty_cache()
    return found


# ------------------------------------------------------------------ ceilings


def ceilings() -> dict[str, float]:
    """Bytes/s of a device-to-device copy (read and written), FLOP/s of a bf16 matrix product of random numbers."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(lambda: a @ b)
    return {"bytes_per_s": 2 * source.numel() / copy, "flops_per_s": 2 * n**3 / product}


def _seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a run by device events, after three runs that are not counted."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


# ------------------------------------------------------------------ log-probs


def logprob_memory(tokens: int = 8192, hidden_size: int = 1536) -> dict[str, float]:
    """Peak bytes beyond inputs and gradients, and seconds, of forward and backward: ours and the plain way."""
    from nemo_aapo.learner.logprobs import selected_logprobs

    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden_size, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), device="cuda")

    def ours() -> torch.Tensor:
        logprobs, _ = selected_logprobs(
            hidden,
            weight,
            targets,
            temperature=1.0,
            vocab_size=VOCABULARY,
            tp_group=None,
            vocab_start=0,
            chunk_tokens=64,
        )
        return logprobs

    def plain() -> torch.Tensor:
        return torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None])[:, 0]

    found: dict[str, float] = {"tokens": tokens, "vocabulary": VOCABULARY}
    for name, compute in (("chunked", ours), ("plain", plain)):

        def step(compute: Callable[[], torch.Tensor] = compute) -> None:
            hidden.grad = weight.grad = None
            compute().sum().backward()

        step()
        floor = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - floor + _bytes(hidden, weight)
        found[f"{name}_seconds"] = _seconds(step, 5)
    found["error"] = float((ours() - plain()).abs().mean().detach())
    return found


def _bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the tensors, or of their gradients."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------ learner


def learner(policy: Any, plan: Plan) -> dict[str, float]:
    """Seconds of a training step, and its FLOP/s over the GPU's peak (MFU).

    FLOPs are 6 for each token and parameter (for the output layer: each trained token), and 6 s^2 h for the causal
    attention of a layer and sequence. Computing logits a second time in the backward pass does not count.
    """
    sizes = plan.micro_batch_tokens, plan.sequence, plan.micro_batches
    batches = [random_batch(policy, *sizes, seed=seed) for seed in range(plan.micro_batches)]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(plan.steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        policy.optimization.train_step(batches, _loss)
        torch.cuda.synchronize()
        if step >= 2:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    operations = training_flops(policy.shape, batches)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    return {
        "seconds": seconds,
        "slowest": max(times),
        "tokens_per_s": tokens / seconds,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "flops": operations,
        "mfu": operations / seconds / _peak(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "fused_weight_gradients": policy.optimization.fused_weight_gradients,
    }


def training_flops(shape: Any, batches: list[Any]) -> float:
    """FLOPs of a training step, as ``learner`` counts them."""
    h, size = shape.hidden_size, shape.head_size
    attention = h * size * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    layer = attention + 3 * h * shape.ffn_hidden_size
    total = 0.0
    for batch in batches:
        lengths = np.diff(batch.cu_seqlens.cpu().numpy())
        total += 6.0 * layer * shape.num_layers * lengths.sum()
        total += 6.0 * shape.vocab_size * h * batch.targets.numel()
        total += 6.0 * float((lengths.astype(float) ** 2).sum()) * shape.num_attention_heads * size * shape.num_layers
    return total


def _peak() -> float:
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_BF16.items() if key in name), float("nan"))


def _loss(logprobs: torch.Tensor, entropy: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -(batch.weights * batch.advantages * logprobs).sum(), {"entropy": entropy.sum()}


# ------------------------------------------------------------------ rollouts


def decode(policy: Any, plan: Plan, rows: int, bytes_per_s: float) -> dict[str, float]:
    """Completion tokens/s of the in-process engine, and the time of a decoding step over its lower bound.

    The bound (floor) is the time to read the weights and the rows' keys and values once.
    """
    from nemo_aapo.engines.megatron.engine import MegatronEngine
    from nemo_aapo.types import SamplingSpec

    shape, length = policy.shape, plan.decode_prompt + plan.decode_tokens
    engine = MegatronEngine(policy.module, VOCABULARY, rows * length)
    prompts = list(np.random.default_rng(0).integers(2, VOCABULARY, (rows, plan.decode_prompt)).astype(np.int32))
    spec = SamplingSpec(temperature=1.0, max_new_tokens=plan.decode_tokens, stop_token_ids=())
    one_token = SamplingSpec(temperature=1.0, max_new_tokens=1, stop_token_ids=())

    def run(sampling: SamplingSpec) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(prompts, sampling, [[i] for i in range(rows)])
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(spec)
    prefill = statistics.median(run(one_token) for _ in range(3))
    seconds = statistics.median(run(spec) for _ in range(3)) - prefill  # the prefill gives the first token
    weights = 2 * sum(p.numel() for p in policy.module.parameters())
    kv = 4 * shape.num_layers * shape.num_query_groups * shape.head_size  # bytes of a token: key and value in bf16
    context = plan.decode_prompt + plan.decode_tokens / 2
    floor = (weights + rows * context * kv) / bytes_per_s
    steps = plan.decode_tokens - 1
    engine.close()
    return {
        "prefill_seconds": prefill,
        "step_ms": 1e3 * seconds / steps,
        "floor_ms": 1e3 * floor,
        "tokens_per_s": rows * steps / seconds,
        "share_of_floor": floor * steps / seconds,
    }
