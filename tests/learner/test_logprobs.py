"""The chunked, vocab-parallel log-probs against ``torch.log_softmax`` on whole logits."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_aapo.learner import logprobs as logprob
from nemo_aapo.learner.logprobs import selected_logprobs

pytestmark = pytest.mark.exact

LARGE_VOCAB = 151_936


@pytest.fixture
def small_tiles(monkeypatch):
    """Let small problems be cut into many tiles too."""
    monkeypatch.setattr(logprob, "MIN_TILE_LOGITS", 1)
    monkeypatch.setattr(logprob, "TILE_ALIGNMENT", 1)


def make_problem(n: int, rows: int, vocab_size: int, h: int = 16, dtype: torch.dtype = torch.float32):
    """Hidden states, a padded weight, targets among the true tokens, and a gradient to send back."""
    generator = torch.Generator().manual_seed(n + rows)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, h, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (n,), generator=generator)
    grad = torch.randn(n, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, grad.to(dtype)


def plain(hidden, weight, targets, temperature, vocab_size):
    """What it must equal."""
    logits = hidden @ weight[:vocab_size].t() / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def one_rank(hidden, weight, targets, temperature, vocab_size, chunk_tokens, entropy_gradient=False):
    return selected_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=None,
        vocab_start=0,
        chunk_tokens=chunk_tokens,
        entropy_gradient=entropy_gradient,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "vocab_size"), [(300, 300), (384, 300), (7, 5)])
@pytest.mark.parametrize(("n", "chunk_tokens"), [(0, 4), (1, 1), (13, 1), (13, 4), (13, 13), (13, 1000)])
def test_values_and_gradients_equal_log_softmax(small_tiles, dtype, temperature, rows, vocab_size, n, chunk_tokens):
    hidden, weight, targets, grad = make_problem(n, rows, vocab_size, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected, expected_entropy = plain(*exact, targets, temperature, vocab_size)
    expected.backward(grad.double())
    logprobs, entropy = one_rank(hidden, weight, targets, temperature, vocab_size, chunk_tokens)
    logprobs.backward(grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    assert logprobs.dtype == entropy.dtype == dtype
    assert not entropy.requires_grad
    for ours, theirs in (
        (logprobs, expected),
        (entropy, expected_entropy),
        (hidden.grad, exact[0].grad),
        (weight.grad, exact[1].grad),  # zero for padded rows
    ):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), **tolerance)


def test_gradcheck_in_float64(small_tiles):
    hidden, weight, targets, _ = make_problem(5, 24, 19, h=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: one_rank(h, w, targets, 0.8, 19, 2)[0], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: one_rank(h, w, targets, 0.8, 19, 2, True), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows", "vocab_size"), [(13, 384, 300), (7, 7, 5), (0, 7, 5)])
def test_an_entropys_gradient_equals_that_of_whole_logits(small_tiles, dtype, n, rows, vocab_size):
    """Together with the log-probs', and alone; a distribution that is sure of its token has none."""
    hidden, weight, targets, grad = make_problem(n, rows, vocab_size, dtype=dtype)
    if n:
        with torch.no_grad():
            hidden[0] = 400.0 * weight[0]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    both, mixed = plain(*exact, targets, 0.7, vocab_size), grad.double()
    torch.autograd.backward(both, (mixed, mixed.flip(0)))
    ours = one_rank(hidden, weight, targets, 0.7, vocab_size, 3, True)
    grad = grad.to(ours[0].dtype)
    torch.autograd.backward(ours, (grad, grad.flip(0)))
    for computed, expected in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * expected.norm()
        assert (computed.double() - expected).norm() <= bound
    entropy = one_rank(*exact, targets, 0.7, vocab_size, 3, True)[1]
    exact[0].grad = None
    entropy.sum().backward()
    assert exact[0].grad.isfinite().all()
    assert not n or exact[0].grad[0].abs().max() < 1e-12


def test_large_logits_neither_overflow_nor_lose_a_sure_token(small_tiles):
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.linspace(-2000.0, 2000.0, 50)[:, None]
    logprobs, entropy = one_rank(hidden, weight, torch.tensor([49, 49]), 1.0, 50, 1)
    assert logprobs.tolist() == pytest.approx([0.0, -4000.0])
    assert entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_softmax_runs_in_float32_for_bfloat16():
    """Only the rounding of the logits themselves may show; one of log-sum-exp (about 7) would cost up to 0.016."""
    hidden, weight, targets, grad = make_problem(600, 1024, 1000, h=64, dtype=torch.bfloat16)
    scaled = (hidden.detach() / 8).requires_grad_()  # logits of about 1
    exact = [x.detach().double().requires_grad_() for x in (scaled, weight)]
    expected, expected_entropy = plain(*exact, targets, 1.0, 1000)
    expected.backward(grad.double())
    logprobs, entropy = one_rank(scaled, weight, targets, 1.0, 1000, 1)
    logprobs.backward(grad.float())
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert scaled.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=5e-3)
    torch.testing.assert_close(logprobs.detach().double(), expected.detach(), rtol=0, atol=2e-2)
    for ours, theirs in ((scaled.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (ours.double() - theirs).norm() < 5e-3 * theirs.norm()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden, weight, targets, grad = make_problem(9, 50, 50)
    one_rank(hidden, weight, targets, 1.0, 50, 2)[0].backward(grad)
    wanted = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    logprobs, _ = one_rank(hidden, weight, targets, 1.0, 50, 2)
    assert logprobs.requires_grad == (frozen != "both")
    if frozen != "both":
        logprobs.backward(grad)
        assert hidden.grad is None if frozen == "hidden" else torch.equal(hidden.grad, wanted[0])
        assert weight.grad is None if frozen == "weight" else torch.equal(weight.grad, wanted[1])


def test_a_target_outside_the_vocabulary_has_no_probability(small_tiles):
    hidden, weight, _, _ = make_problem(3, 12, 10)
    logprobs, entropy = one_rank(hidden, weight, torch.tensor([10, -100, 4]), 1.0, 10, 1)
    assert logprobs.isneginf().tolist() == [True, True, False]
    assert entropy.isfinite().all()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still alive, and their peak."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in self.known:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def peak_bytes(function, hidden, weight, targets) -> int:
    gc.collect()
    with LiveBytes(hidden, weight, targets) as counter:
        logprobs, entropy = function()
        (logprobs + entropy).sum().backward()
    hidden.grad = weight.grad = None
    return counter.peak


@pytest.mark.slow
def test_peak_memory_at_a_large_vocabulary_is_an_eighth_of_the_plain_way_or_less():
    n, h = 256, 64
    hidden, weight, targets, _ = make_problem(n, LARGE_VOCAB, LARGE_VOCAB, h=h)
    whole = n * LARGE_VOCAB * 4  # bytes of the logits
    theirs = peak_bytes(lambda: plain(hidden, weight, targets, 0.7, LARGE_VOCAB), hidden, weight, targets)
    ours = peak_bytes(lambda: one_rank(hidden, weight, targets, 0.7, LARGE_VOCAB, 8), hidden, weight, targets)
    assert theirs > 2 * whole  # the counter sees what autograd keeps
    assert weight.nbytes < ours < theirs / 8
    assert ours < weight.nbytes + 2 * 8 * LARGE_VOCAB * 4 * 1.1  # the weight's gradient and two tiles
    ours = peak_bytes(lambda: one_rank(hidden, weight, targets, 0.7, LARGE_VOCAB, 8, True), hidden, weight, targets)
    assert ours < weight.nbytes + 3 * 8 * LARGE_VOCAB * 4 * 1.1  # of an entropy's gradient one more


def test_scoring_holds_two_tiles_and_nothing_else():
    hidden, weight, targets, _ = make_problem(256, LARGE_VOCAB, LARGE_VOCAB, h=16)
    with torch.no_grad(), LiveBytes(hidden, weight, targets) as counter:
        one_rank(hidden, weight, targets, 1.0, LARGE_VOCAB, 4)
    assert counter.peak < 2 * 4 * LARGE_VOCAB * 4 * 1.1


@mock.patch.multiple(logprob, MIN_TILE_LOGITS=1, TILE_ALIGNMENT=1)  # and back: the rank goes on to other tests
def _on_a_rank(problem, vocab_size, temperature):
    """Log-probs, entropies, this rank's part of the hidden states' gradient and its shard's gradient."""
    hidden, weight, targets, grad = problem
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = hidden.detach().requires_grad_()
    shard = weight.detach().chunk(size)[rank].clone().requires_grad_()
    logprobs, entropy = selected_logprobs(
        hidden,
        shard,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
        vocab_start=rank * len(shard),
        chunk_tokens=3,
        entropy_gradient=True,
    )
    torch.autograd.backward((logprobs, entropy), (grad, grad.flip(0)))
    return [x.detach().numpy() for x in (logprobs, entropy, hidden.grad, shard.grad)]


@pytest.mark.parametrize(
    ("n", "vocab_size"), [(11, 64), (11, 50), (11, 20), (0, 64)], ids=["full", "padded", "empty_shard", "no_tokens"]
)
def test_a_vocabulary_over_two_ranks_equals_one_rank(ranks, n, vocab_size):
    """With 20 true tokens of 64 the second rank has padding only."""
    problem = make_problem(n, 64, vocab_size, dtype=torch.float64)
    hidden, weight, targets, grad = problem
    logprobs, entropy = one_rank(hidden, weight, targets, 0.7, vocab_size, 3, True)
    torch.autograd.backward((logprobs, entropy), (grad, grad.flip(0)))
    detached = [x.detach() for x in problem]
    results = ranks.run(_on_a_rank, detached, vocab_size, 0.7, world=2, tp=2)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for result in results:
        torch.testing.assert_close(torch.from_numpy(result[0]), logprobs.detach(), **close)
        torch.testing.assert_close(torch.from_numpy(result[1]), entropy.detach(), **close)
    partial = [torch.from_numpy(result[2]) for result in results]
    shards = [torch.from_numpy(result[3]) for result in results]
    torch.testing.assert_close(sum(partial), hidden.grad, **close)
    torch.testing.assert_close(torch.cat(shards), weight.grad, **close)


def test_mistakes_are_named():
    hidden, weight, targets, _ = make_problem(3, 10, 10)
    for change, message in (
        ({"hidden": hidden[:, :5]}, r"\[n, h\], \[v, h\] and \[n\] are needed"),
        ({"targets": targets[:2]}, r"\[n, h\], \[v, h\] and \[n\] are needed"),
        ({"hidden": hidden.double()}, "one dtype is needed"),
        ({"temperature": 0.0}, "both must be positive"),
        ({"chunk_tokens": 0}, "both must be positive"),
    ):
        arguments = {"hidden": hidden, "weight": weight, "targets": targets, "temperature": 1.0, "chunk_tokens": 1}
        with pytest.raises(ValueError, match=message):
            one_rank(**(arguments | change), vocab_size=10)
