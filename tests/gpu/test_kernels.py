"""The GPU's way through engine and log-probs as a whole: graphs, kernels, float32 products of 16-bit inputs.

The kernels one by one: tests/engines/megatron/test_triton.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_aapo.learner import logprobs as logprob
from nemo_aapo.types import Completion
from tests.engines.megatron import test_engine as engines
from tests.learner import test_logprobs as test_logprob


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)


def common(row: Completion, other: Completion) -> int:
    """Tokens before the first that differs."""
    length = min(len(row.token_ids), len(other.token_ids))
    same = row.token_ids[:length] == other.token_ids[:length]
    return length if same.all() else int(same.argmin())


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_the_completions_of_single_kernels(one_rank, tiny_models, name, dtype):
    """In bfloat16 the number of rows changes the rounding of products, now and then a token, but no log-prob much."""
    from nemo_aapo.engines.megatron.engine import MegatronEngine

    model = engines.build(tiny_models[name]).to("cuda", dtype)
    engine = MegatronEngine(model, engines.VOCAB_SIZE, engines.TIGHT)
    assert engine.cuda_graphs

    def draw():
        return [c for row in engine.generate(engines.prompts(), engines.SPEC, engines.SEEDS) for c in row]

    engine.cuda_graphs = False
    plain = draw()
    engine.cuda_graphs = True
    first, kept = draw(), engine.graphs
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        weight.neg_()  # in place, as the optimizer does it: the graphs must see it
        changed = draw()
        weight.neg_()
    again = draw()
    assert engine.graphs is kept
    assert kept.captured
    engine.sleep()
    assert engine.graphs is None

    assert any(common(a, b) < len(a.token_ids) for a, b in zip(plain, changed, strict=True))
    for others in (first, again):
        if dtype == torch.float32:
            assert [c.token_ids.tolist() for c in others] == [c.token_ids.tolist() for c in plain]
        pairs = [(a.logprobs[: common(a, b)], b.logprobs[: common(a, b)]) for a, b in zip(plain, others, strict=True)]
        gaps = np.concatenate([np.abs(a - b) for a, b in pairs])
        assert len(gaps) >= len(plain)
        assert gaps.mean() < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows", "vocab_size", "h"), [(1000, 5000, 4900, 128), (4096, 152_064, 151_936, 256)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_on_a_gpu(monkeypatch, dtype, n, rows, vocab_size, h, temperature):
    """Several tiles; against float64 on the same, rounded, inputs."""
    monkeypatch.setattr(logprob, "CUDA_MIN_TILE_LOGITS", n * rows // 5)
    hidden = torch.randn(n, h, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(rows, h, device="cuda") * 2 * h**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (n,), device="cuda")
    grad = torch.randn(n, device="cuda")
    logprobs, entropy = test_logprob.one_rank(hidden, weight, targets, temperature, vocab_size, 1)
    logprobs.backward(grad)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected, expected_entropy = test_logprob.plain(*exact, targets, temperature, vocab_size)
    expected.backward(grad.double())
    torch.testing.assert_close(logprobs.detach().double(), expected.detach(), rtol=0, atol=5e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-4)
    for ours, theirs in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (ours.double() - theirs).norm() < (1e-5 if dtype == torch.float32 else 6e-3) * theirs.norm()
