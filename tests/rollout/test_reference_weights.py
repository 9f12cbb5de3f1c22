"""Whose weights draw reference rewards online, what the margin makes of them, and a store that is filled alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random

import numpy as np
import pytest

from tests.rollout.reference_runs import SHORT, by_question, fit, rows, with_trainer
from tests.training_runs import make_input, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model and ten prompts."""
    return make_input(tmp_path_factory.mktemp("reference"))


def test_online_rewards_are_the_references_and_leave_the_policy_as_it_was(ranks, folder):
    paper = ["algorithm=aapo_paper", "trainer.max_steps=2", "model.optim.lr=0.05"]
    for tp, pp in ((1, 1), (2, 2)):
        config = settings(folder, folder / f"online{tp}{pp}", *SHORT, *paper, tp=tp, pp=pp, world=tp * pp)
        for before, after, policy, states, served in ranks.run(with_trainer, config, online, world=tp * pp, tp=None):
            assert before == after  # drawn at step 0, and from the same reference after two updates
            assert policy != before
            assert len(set(states)) == 1
            reference, own = served
            assert reference[0] == 0
            assert own[0] == 2
            assert reference[1] != own[1]  # an engine with a copy of the weights is given the one, then the other


def online(trainer):
    from nemo_aapo.seeds import stream_seed

    rollouts, prompts = trainer.rollouts, list(trainer.rollouts.data)
    before = rollouts.reference.rewards(prompts, 7, rollouts.reference_served)
    trainer.fit()
    states, served = [fingerprint(trainer)], []
    engine, take = rollouts.collector.engine, rollouts.collector.engine.update_weights

    def receive(named_weights, version):
        served.append((version, digest([tensor for _, tensor in named_weights])))
        take(iter(()), version)

    engine.update_weights = receive
    after = rollouts.reference.rewards(prompts, 7, rollouts.reference_served)
    states.append(fingerprint(trainer))
    rollouts.refit()  # as before the next step
    seeds = [[stream_seed(trainer.config.seed, "online", 7, p.id, k) for k in range(4)] for p in prompts]
    policy = rollouts.reference._sample(prompts, seeds)
    return *(by_question(rewards, trainer) for rewards in (before, after, policy)), states, served


def fingerprint(trainer):
    """Of this rank's weights, optimizer, scheduler, and every random generator."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    policy = trainer.policy
    assert policy.version == 2
    return digest(
        [
            list(policy.module.parameters()),
            [buffer for _, buffer in policy.module.named_buffers()],
            policy.optimization.optimizer.state_dict(),
            policy.optimization.scheduler.state_dict(),
            torch.get_rng_state(),
            get_cuda_rng_tracker().get_states(),
            np.random.get_state()[1],
            random.getstate(),
        ]
    )


def digest(value):
    """Of nested values and the very bytes of their tensors."""
    import torch

    total = hashlib.sha256()

    def add(item):
        if isinstance(item, torch.Tensor):
            item = item.detach().contiguous().view(-1).view(torch.uint8).numpy() if item.numel() else str(item.shape)
        if isinstance(item, np.ndarray):
            total.update(item.tobytes())
        elif isinstance(item, dict):
            add([part for pair in item.items() for part in pair])
        elif isinstance(item, list | tuple):
            for part in item:
                add(part)
        else:
            total.update(repr(item).encode())

    add(value)
    return total.hexdigest()


def test_over_many_draws_the_expected_margin_has_the_sampled_ones_mean_and_a_lower_variance(ranks, folder):
    from nemo_aapo.algorithms import advantage

    draws, samples = 96, 8
    words = [f"algorithm.reference_samples={draws * samples}", "rollout.max_concurrent_tokens=6144"]
    ((rewards, reference),) = ranks.run(
        with_trainer, settings(folder, folder / "many", *SHORT, *words), margins, tp=None
    )
    stores = reference.reshape(len(rewards), draws, samples)  # as that many runs with other seeds would have stored
    expected, sampled = [], []
    for draw in range(draws):
        stored = stores[:, draw]
        pairs = advantage.sample_pairs([1000 * draw + i for i in range(len(rewards))], rewards.shape[1], samples)
        expected.append(advantage.margin(rewards, stored, -0.2, 0.28, "expected"))
        sampled.append(advantage.margin(rewards, stored, -0.2, 0.28, "sampled", pairs))
    difference = np.array(expected) - np.array(sampled)
    error = difference.std(axis=0, ddof=1) / np.sqrt(draws)
    assert (error > 0).all()
    assert (abs(difference.mean(axis=0)) < 4 * error).all()
    assert (np.var(expected, axis=0) < 0.4 * np.var(sampled, axis=0)).all()  # 1 / K = 0.125 in the limit


def margins(trainer):
    prompts = list(trainer.rollouts.data[:2])
    assert trainer.rollouts.reference.prepare(prompts, trainer.rollouts.reference_served)
    stored = trainer.rollouts.reference.rewards(prompts, 0, trainer.rollouts.reference_served)
    reference = np.stack([stored[p.id] for p in prompts])
    seeds = [[10 * i + j for j in range(4)] for i in range(len(prompts))]
    groups = trainer.rollouts.collector.collect(prompts, trainer.rollouts.sampling, seeds)
    return np.stack([group.rewards for group in groups]), reference


# ---------------------------------------------------------------- filled alone


def test_shards_and_their_merge_give_what_a_run_draws_itself_and_the_run_draws_nothing_more(ranks, folder, tmp_path):
    store = tmp_path / "shared" / "s.sqlite"
    integer = ["rewards=[{name: integer, weight: 1.0}]", "validation.reward=integer", "reward_runner.workers=0"]
    words = settings(folder, tmp_path / "run", *SHORT, *integer, f"algorithm.reference_store={store}")
    alone = settings(folder, tmp_path / "alone", *SHORT, *integer)
    jobs = [
        (job, alone), (job, words, "status"), (job, words, 0, 3), (job, words, 2, 3), (job, words, "merge"),
        (job, words, 1, 3), (job, words, "merge"), (job, words, "status"),
    ]  # fmt: skip
    done = [ranks.run(*each, tp=None)[0] for each in jobs]
    assert [code for code, _ in done] == [0, 1, 0, 0, 1, 0, 0, 0]
    said = [text for _, text in done]
    assert "0 of 10 prompts" in said[1]
    assert "s.shard-0002-of-0003.sqlite: 3 prompts x 4 reference rewards" in said[3]
    assert "7 of 10 prompts" in said[4]
    assert "missing: 3 prompts" in said[4]
    assert "s.shard-0001-of-0003.sqlite: 3 prompts" in said[6]
    assert "10 of 10 prompts" in said[7]
    assert rows(store) == rows(tmp_path / "alone" / "reference_rewards.sqlite")
    again = ranks.run(job, [*words, "seed=9"], "status", tp=None)[0]
    assert again[0] == 1
    assert "holds rewards for other settings: seed: 1234 there, 9 here" in again[1]
    warm = settings(folder, tmp_path / "warm", *SHORT, f"algorithm.reference_store={store}", "rollout.temperature=0.5")
    with pytest.raises(AssertionError, match=r"(?s)ConfigError.*sampling\.temperature: 1\.0 there, 0\.5 here"):
        ranks.run(with_trainer, warm, fit, tp=None)


def job(overrides, what=None, shards=None):
    """``scripts/reference_rewards.py`` within this rank: its exit code and what it says."""
    from nemo_aapo import load_config
    from nemo_aapo.jobs import fill_reference as reference_job
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.reference_store.shards import Shard

    resolved = resolve(load_config(overrides), 1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if what in ("merge", "status"):
            return getattr(reference_job, what)(resolved), out.getvalue()
        return reference_job.fill(resolved, None if shards is None else Shard(what, shards)), out.getvalue()
