"""Reference rewards with real models: the same values however they are drawn, what they cost, whose weights serve."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.training_runs import TIMES, Parity, make_input, settings

SHORT = ["trainer.max_steps=4", "checkpoint.save_interval=2", "trainer.val_check_interval=0", "export_hf_model=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model and ten prompts."""
    return make_input(tmp_path_factory.mktemp("reference"))


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self, stop_after=None):
        self.metrics, self.phases, self.notes, self.asked, self.stop_after = [], [], [], 0, stop_after

    def begin(self, step): ...
    def phase(self, name, done, total):
        self.phases.append((name, done, total))

    def note(self, text):
        self.notes.append(text)

    def log_step(self, step, metrics):
        self.metrics.append({k: v for k, v in metrics.items() if not k.startswith(TIMES)})

    def log_validation(self, step, metrics, samples): ...
    def save_rollouts(self, name, samples): ...
    def stop_requested(self):
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after


def with_trainer(overrides, job, *arguments, stop_after=None):
    """What ``job(trainer, *arguments)`` returns, on one rank."""
    from nemo_aapo import RewardRunner, load_config
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.training.build import build_training, initialize

    config = load_config(overrides)
    initialize(config)
    resolved = resolve(config, int(os.environ["WORLD_SIZE"]), given=("rewards",))
    with contextlib.ExitStack() as stack:
        rewards = RewardRunner([(Parity(), 1.0)], workers=0, timeout_s=10.0)
        reporter = Quiet(stop_after)
        trainer = build_training(resolved, reporter=reporter, stack=stack, rewards=rewards)
        return job(trainer, *arguments)


def by_question(rewards, trainer):
    return {p.text: rewards[p.id].tolist() for p in trainer.rollouts.data if p.id in rewards}


# ---------------------------------------------------------------- the same values


def fit(trainer):
    drawn = counted(trainer)
    complete = trainer.fit()
    return complete, trainer.reporter.metrics, by_question(trainer.rollouts.reference._known, trainer), drawn


def counted(trainer):
    """Tokens of each ``generate`` call from now on."""
    tokens, generate = [], trainer.rollouts.collector.engine.generate

    def counting(*arguments, **more):
        out = generate(*arguments, **more)
        tokens.append(sum(len(completion.token_ids) for row in out for completion in row))
        return out

    trainer.rollouts.collector.engine.generate = counting
    return tokens


@pytest.fixture(scope="module")
def filled_first(ranks, folder):
    """A run of four steps that filled its store before the first."""
    ((complete, metrics, values, drawn),) = ranks.run(
        with_trainer, settings(folder, folder / "first", *SHORT), fit, tp=None
    )
    assert complete
    assert len(metrics) == 4
    assert len(values) == 10
    assert len(drawn) == 1 + 4  # one batch of reference completions, then the policy's alone
    return metrics, values


def test_a_store_that_is_filled_ahead_of_need_holds_the_same(ranks, folder, filled_first):
    ahead = settings(folder, folder / "ahead", *SHORT, "algorithm.reference_fill_steps=2")
    ((_, metrics, values, drawn),) = ranks.run(with_trainer, ahead, fit, tp=None)
    assert (metrics, values) == filled_first
    assert len(drawn) == 2 + 4  # before the first and the third step; by then under updated weights


@pytest.mark.parametrize(("tp", "pp", "world"), [(2, 1, 2), (1, 2, 2), (1, 1, 2)])
def test_a_deleted_store_is_filled_again_to_the_same_values_on_any_layout(ranks, folder, filled_first, tp, pp, world):
    config = settings(folder, folder / "first", *SHORT, tp=tp, pp=pp, world=world)
    (folder / "first" / "reference_rewards.sqlite").unlink()
    for _, values, _ in ranks.run(with_trainer, config, prepare, world=world, tp=None):
        assert values == filled_first[1]


def prepare(trainer):
    drawn = counted(trainer)
    complete = trainer.rollouts.reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served)
    return complete, by_question(trainer.rollouts.reference._known, trainer), drawn


def test_a_resumed_run_whose_store_is_gone_goes_on_to_the_same_metrics(ranks, folder, filled_first):
    half = settings(folder, folder / "half", *SHORT, "trainer.max_steps=2")
    ranks.run(with_trainer, half, fit, tp=None)
    (folder / "half" / "reference_rewards.sqlite").unlink()
    ((_, metrics, _, drawn),) = ranks.run(with_trainer, settings(folder, folder / "half", *SHORT), fit, tp=None)
    assert metrics == filled_first[0][2:]
    assert len(drawn) == 1 + 2


def test_a_stop_signal_while_the_store_is_filled_keeps_what_was_drawn(ranks, folder, filled_first):
    config = settings(folder, folder / "stopped", *SHORT)
    ((complete, metrics, values, _),) = ranks.run(with_trainer, config, stopped_fit, tp=None)
    assert not complete
    assert metrics == []
    assert len(values) == 4
    assert not list((folder / "stopped").glob("checkpoints/step_*"))
    ((complete, metrics, values, drawn),) = ranks.run(with_trainer, config, fit, tp=None)
    assert complete
    assert (metrics, values) == filled_first
    assert len(drawn) == 1 + 4


def stopped_fit(trainer):
    reference = trainer.rollouts.reference
    reference.fill_batch, reference.first = 4, 0  # which prompt comes first depends on run.dir
    trainer.reporter.stop_after = 0
    return fit(trainer)


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 1, 2), (1, 1, 2)])
def test_a_stop_in_the_midst_of_a_batch_keeps_what_was_scored_by_then(ranks, folder, filled_first, tp, pp, world):
    run_dir = folder / f"midst{tp}{pp}{world}"
    config = settings(folder, run_dir, *SHORT, tp=tp, pp=pp, world=world)
    for stored, complete, asked in ranks.run(with_trainer, config, stopped_within_a_batch, world=world, tp=None):
        assert not complete
        assert asked > 0
        assert 0 < stored < 10 * 4
    ((complete, values, drawn),) = ranks.run(with_trainer, settings(folder, run_dir, *SHORT), prepare, tp=None)
    assert complete
    assert values == filled_first[1]
    assert len(drawn) == 1


def stopped_within_a_batch(trainer):
    """Two sequences run at a time, and a stop is asked for once some have ended; what is stored then, on rank 0."""
    from nemo_aapo.distributed import parallel
    from nemo_aapo.rollout import collector

    collector.WATCH_S, before = 0.0, collector.WATCH_S
    reference, asked = trainer.rollouts.reference, []
    trainer.rollouts.collector.engine.max_concurrent_tokens = 48
    reference.first = 0

    def stop():
        asked.append(1)
        return len(asked) > 6

    try:
        complete = reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served, stop_requested=stop)
    finally:
        collector.WATCH_S = before
    store, ids = reference.store, [prompt.id for prompt in trainer.rollouts.data]
    stored = parallel.broadcast_from_first_rank(store and sum(map(len, store.read(ids, 4).values())))
    return stored, complete, len(asked)


def test_a_run_skips_what_another_one_has_stored_meanwhile(ranks, folder, filled_first):
    config = settings(folder, folder / "meanwhile", *SHORT)
    ((values, drawn),) = ranks.run(with_trainer, config, prepare_beside_another, tp=None)
    assert values == filled_first[1]
    assert len(drawn) == 2
    assert sum(drawn) < sum(len(row) for row in values.values()) * 8  # of the second batch, another run drew a part
    more = [*config, "algorithm.reference_samples=6"]
    ((_, more_values, more_drawn),) = ranks.run(with_trainer, more, prepare, tp=None)
    assert {question: row[:4] for question, row in more_values.items()} == filled_first[1]
    assert len(more_drawn) == 1
    assert more_drawn[0] < sum(drawn)  # two samples of ten prompts, instead of four of eight


def prepare_beside_another(trainer):
    """Two batches; after the first, another run stores a part of the second."""
    from nemo_aapo.reference_store.store import RewardStore

    reference, last = trainer.rollouts.reference, list(trainer.rollouts.data[8:])
    reference.fill_batch, reference.first = 4, 0
    theirs = reference._sample(last, reference_seeds(reference, last))
    drawn = counted(trainer)

    def report(done, total):
        if done == 16:
            with contextlib.closing(RewardStore(reference.store.path, reference.key)) as other:
                other.write(theirs)

    assert reference.prepare(trainer.rollouts.data, trainer.rollouts.reference_served, report)
    return by_question(reference._known, trainer), drawn


def reference_seeds(reference, prompts):
    from nemo_aapo.seeds import stream_seed

    return [[stream_seed(reference.seed, "reference", p.id, k) for k in range(reference.samples)] for p in prompts]


def by_few_bytes(overrides, what):
    """``with_trainer`` where eight bytes of each tensor tell a model from others, as 64 KiB do of a large one."""
    from nemo_aapo.run import identity

    piece, identity.PIECE = identity.PIECE, 8
    try:
        return with_trainer(overrides, what)
    finally:
        identity.PIECE = piece


def test_a_checkpoint_is_not_resumed_with_the_rewards_of_another_reference(ranks, folder, tmp_path):
    """Of a model that differs in a number which the run's own identity of it does not look at."""
    from safetensors.torch import load_file, save_file

    for name in ("model", "train.jsonl", "validation.jsonl"):
        (shutil.copytree if name == "model" else shutil.copy)(folder / name, tmp_path / name)
    half = settings(tmp_path, tmp_path / "run", *SHORT, "trainer.max_steps=2")
    ranks.run(by_few_bytes, half, fit, tp=None)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    resumed = settings(tmp_path, tmp_path / "run", *SHORT, tp=2, world=2)
    with pytest.raises(AssertionError) as raised:
        ranks.run(by_few_bytes, resumed, fit, world=2, tp=None)
    assert str(raised.value).count("RunError: this run began with other reference rewards") == 2  # on both ranks
    assert "model: " in str(raised.value)


# ---------------------------------------------------------------- online, and what it costs


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


def test_a_cached_step_draws_as_many_tokens_as_a_gpg_step_and_an_online_one_about_twice(ranks, folder, filled_first):
    words = ["trainer.max_steps=1", "prompts_per_step=8"]
    tokens = {}
    for algorithm in ("aapo", "gpg", "aapo_paper"):
        config = settings(folder, folder / f"cost_{algorithm}", *SHORT, *words, f"algorithm={algorithm}")
        (tokens[algorithm],) = ranks.run(with_trainer, config, drawn_by_fit, tp=None)
    (filling, cached), (gpg,), (policy, reference) = tokens["aapo"], tokens["gpg"], tokens["aapo_paper"]
    assert filling > 0  # once for all steps that take these prompts
    assert cached == gpg == policy
    assert 1.7 * gpg < reference + policy < 2.3 * gpg


def drawn_by_fit(trainer):
    drawn = counted(trainer)
    trainer.fit()
    return drawn


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


def rows(store: Path):
    import sqlite3

    with contextlib.closing(sqlite3.connect(store)) as db:
        return db.execute("SELECT digest, prompt, sample, reward FROM rewards JOIN keys ON key = number").fetchall()
